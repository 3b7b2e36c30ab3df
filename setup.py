"""What pyproject.toml cannot say: the kernels are compiled at install, where a compiler is, and left out where none is.

Without them, or after their source has changed, `nashswarm.kernels.build` compiles them at their first use.
"""

from __future__ import annotations

import importlib.util

from setuptools import Extension, setup

PLACE = "src/nashswarm/kernels/build.py"  # it imports nothing of the project, which is not installed yet

spec = importlib.util.spec_from_file_location("build_kernels", PLACE)
assert spec
assert spec.loader
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

setup(
    ext_modules=[
        Extension(
            "nashswarm.kernels._tiles",
            ["src/nashswarm/kernels/tiles.cpp"],
            extra_compile_args=list(build.FLAGS),
            extra_link_args=["-pthread"],
            define_macros=[build.definition()],
            language="c++",
            optional=True,
        )
    ]
)
