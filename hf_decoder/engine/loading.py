"""Checks that the weights of a checkpoint have the sizes that its config asks for."""

from transformers.modeling_utils import PreTrainedModel

# What is lacking is filled with random numbers up to this many, whatever is there: a new head, say. 1/4 GB in fp32.
MAX_NEW_PARAMETERS = 1 << 26


class HfDecoderSizeError(ValueError, RuntimeError):
    """Weights that are not of the sizes in the config; transformers' own error of this kind is a RuntimeError."""


def fields_of(config, sizes: set[int]) -> str:
    """The fields of a config that are, alone or as heads times their width, one of `sizes`."""
    values = {field: value for field, value in config.to_dict().items() if type(value) is int and value > 1}
    width = values.get("head_dim", 1)
    named = [f"{field}={value}" for field, value in values.items() if value in sizes]
    for field in ("num_attention_heads", "num_key_value_heads"):
        if width > 1 and values.get(field, 0) * width in sizes:
            named.append(f"{field}={values[field]} of head_dim={width}")
    return " and ".join(named)


def check_loaded_sizes(model: PreTrainedModel, info, where: str, ignore_mismatched: bool) -> None:
    """Raises HfDecoderSizeError for a tensor of another shape, or where more is lacking than there is."""
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
