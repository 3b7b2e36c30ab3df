"""Packed directories for transformers' `from_pretrained`, registered when transformers is imported beside nashswarm.

transformers asks a registered quantizer for modules and lets it finish the model. Ours has it open the payload (none
of whose arrays is a parameter) and then fills every parameter itself, by the code of `nashswarm.load`. Without this
plug-in transformers finds no weights file in a packed directory, and says so: no weight is ever left at random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nashswarm.packed import PAYLOAD, QUANT_METHOD


def register(auto: Any) -> None:
    """Make transformers know packed directories. Arguments: `auto`, the module transformers.quantizers.auto."""
    if QUANT_METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return

    class NashSwarmConfig(auto.QuantizationConfigMixin):  # type: ignore[misc]
        """What config.json of a packed directory says: how to load it."""

        def __init__(self, quant_method: str = QUANT_METHOD, **_: Any) -> None:
            self.quant_method = quant_method
            self.dequantize = True  # once loaded, it is a plain model, and saved as one

    class NashSwarmQuantizer(auto.HfQuantizer):  # type: ignore[misc]
        """Decodes every parameter of a model from its packed directory."""

        requires_calibration = True
        is_trainable = True
        directory: Path
        tied: dict[str, str]

        def is_serializable(self) -> bool:
            return True

        def update_attn_implementation(self, config: Any) -> Any:
            """The one call that comes before weight files are looked for: names ours."""
            config.transformers_weights = PAYLOAD
            return config

        def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str], **_: Any) -> Any:
            self.directory = Path(checkpoint_files[0]).parent
            self.tied, model.all_tied_weights_keys = model.all_tied_weights_keys, {}  # else it misses both of a pair
            model._keys_to_ignore_on_load_missing = {".*"}
            model._keys_to_ignore_on_load_unexpected = {".*"}
            for parameter in model.parameters():
                parameter._is_hf_initialized = True
            return model

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            from nashswarm.loading import fill_model

            model.all_tied_weights_keys = self.tied
            model.tie_weights()
            fill_model(model, self.directory)
            return model

    auto.register_quantization_config(QUANT_METHOD)(NashSwarmConfig)
    auto.register_quantizer(QUANT_METHOD)(NashSwarmQuantizer)
