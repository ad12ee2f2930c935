"""What transformers calls the cache: `cache` from 5.24 on, `past_key_values` before.

Callers of the model may use either name; what the model hands to transformers goes by `CACHE_NAME`.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def takes_either_cache_name(forward: Callable) -> Callable:
    """`forward`, which takes `past_key_values`, with `cache` as another name for it.

    Only where transformers has that name: before, `cache` is what continuous batching sends to the attention function.

    Raises:
        ValueError: on a call with both.
    """
    if CACHE_NAME == "past_key_values":
        return forward

    @wraps(forward)
    def forward_either(*args, cache=None, **kwargs):
        if cache is not None:
            if kwargs.get("past_key_values") is not None:
                raise ValueError("cache and past_key_values are two names of one argument; give one of them")
            kwargs["past_key_values"] = cache
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    *named, others = signature.parameters.values()
    cache = inspect.Parameter("cache", inspect.Parameter.KEYWORD_ONLY, default=None)
    forward_either.__signature__ = signature.replace(parameters=[*named, cache, others])  # type: ignore[attr-defined]
    return forward_either


__all__ = ["CACHE_NAME", "takes_either_cache_name"]
