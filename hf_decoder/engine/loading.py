"""Checks that the weights of a checkpoint have the sizes that its config asks for."""

from transformers.modeling_utils import PreTrainedModel

# Up to this many missing parameters, such as a new head, are always filled with random numbers. 1/4 GB in fp32.
MAX_NEW_PARAMETERS = 1 << 26


class HfDecoderSizeError(ValueError, RuntimeError):
    """Raised for weights of other sizes than in the config; a RuntimeError too, like that of transformers."""


def fields_of(config, sizes: set[int]) -> str:
    """The fields of a config that equal one of `sizes`, alone or as heads times head_dim."""
    values = {field: value for field, value in config.to_dict().items() if type(value) is int and value > 1}
    width = values.get("head_dim", 1)
    named = [f"{field}={value}" for field, value in values.items() if value in sizes]
    for field in ("num_attention_heads", "num_key_value_heads"):
        if width > 1 and values.get(field, 0) * width in sizes:
            named.append(f"{field}={values[field]} of head_dim={width}")
    return " and ".join(named)


def check_loaded_sizes(model: PreTrainedModel, info, where: str, ignore_mismatched: bool) -> None:
    """Raises HfDecoderSizeError for a tensor of another shape, or if more parameters are missing than present."""
    for name, stored, asked in sorted(info.mismatched_keys):
        if not ignore_mismatched:
            named = fields_of(model.config, {size for size in asked if size not in stored})
            raise HfDecoderSizeError(
                f"the weights in {where} do not fit the config: {name!r} is of shape {list(stored)}, but "
                f"{named or 'the config'} asks for {list(asked)}; correct config.json, or pass "
                "ignore_mismatched_sizes=True to start with random numbers there"
            )
    lacking = {name for name in info.missing_and_mismatched() if name not in model.all_tied_weights_keys}
    if not lacking:
        return
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    new = sum(size for name, size in sizes.items() if name in lacking)
    if new > max(MAX_NEW_PARAMETERS, sum(sizes.values()) - new):
        largest = max(lacking & sizes.keys(), key=lambda name: (sizes[name], name))
        raise HfDecoderSizeError(
            f"the weights in {where} lack {new:,} of the {sum(sizes.values()):,} parameters that the config asks for, "
            f"{largest!r} among them; correct config.json, or build a new model with from_config"
        )


__all__ = ["MAX_NEW_PARAMETERS", "HfDecoderSizeError", "check_loaded_sizes", "fields_of"]
