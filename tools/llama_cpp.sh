#!/usr/bin/env bash
# llama.cpp's quantizer, importance matrix and converter, from llama-cpp-python's source package, into the peers'
# environment: PREFIX/llama.cpp. Needs a C++ compiler; cmake and ninja come from the environment. It took 16 minutes on 2 busy cores.
set -euo pipefail
prefix=$(realpath "$1")
version=$(sed -n 's/^llama-cpp-python==//p' "$(dirname "$0")/../constraints-peers.txt")
target=$prefix/llama.cpp
if [ -f "$target/VERSION" ] && [ "$(cat "$target/VERSION")" = "llama-cpp-python $version" ]; then exit 0; fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$prefix/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python --dest "$scratch" "llama-cpp-python==$version"
tar -xzf "$scratch"/llama_cpp_python-*.tar.gz -C "$scratch"
source=$(echo "$scratch"/llama_cpp_python-*/vendor/llama.cpp)
export PATH=$prefix/bin:$PATH
cmake -S "$source" -B "$scratch/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF \
  -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF >"$scratch/log"
cmake --build "$scratch/build" --target llama-quantize llama-imatrix >>"$scratch/log"
mkdir -p "$target"
cp "$scratch"/build/bin/llama-{quantize,imatrix} "$target"
cp -r "$source"/{convert_hf_to_gguf.py,conversion,gguf-py,LICENSE} "$target"
echo "llama-cpp-python $version" >"$target/VERSION"
