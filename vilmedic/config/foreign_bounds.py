"""Bounds of the numbers of torch, torchvision and transformers, whose signatures state none."""

from __future__ import annotations

import re
from dataclasses import replace

from vilmedic.config.annotations import (
    ANY,
    NUMBERS,
    AnyOf,
    ListOf,
    MapOf,
    Mark,
    Marked,
    TupleOf,
    Type,
)
from vilmedic.config.signature import Signature
from vilmedic.config.types import Above, AtLeast, AtMost, Below, Between

Bounds = tuple[Mark, ...]

_SHARE: Bounds = (Between(0, 1),)
_PORTION: Bounds = (Above(0), AtMost(1))
_BELOW_ONE: Bounds = (AtLeast(0), Below(1))
_RATE: Bounds = (Above(0), AtMost(1000))
_NOT_NEGATIVE: Bounds = (Between(0, 1000),)
_SIDE: Bounds = (Between(1, 16384),)
_STEPS: Bounds = (AtLeast(1),)
_ANGLE: Bounds = (Between(-360, 360),)
_FACTOR: Bounds = (Between(0, 1000),)

_OPTIMIZERS: dict[str, Bounds] = {
    "lr": _RATE,
    "alpha": _BELOW_ONE,
    "betas": _BELOW_ONE,
    "beta2_decay": (Between(-1, 0),),
    "d": (Between(1, 1000000),),
    "dampening": _SHARE,
    "eps": _PORTION,
    "etas": (Above(0), AtMost(100)),
    "initial_accumulator_value": _NOT_NEGATIVE,
    "lambd": _SHARE,
    "lr_decay": _NOT_NEGATIVE,
    "momentum": _BELOW_ONE,
    "momentum_decay": _NOT_NEGATIVE,
    "ns_steps": (Between(1, 100),),
    "rho": _BELOW_ONE,
    "step_sizes": _RATE,
    "t0": (Between(0, 1000000000000),),
    "weight_decay": _NOT_NEGATIVE,
}
_SCHEDULERS: dict[str, Bounds] = {
    "T_0": _STEPS,
    "T_max": _STEPS,
    "T_mult": (Between(1, 1000),),
    "base_lr": _NOT_NEGATIVE,
    "base_momentum": _BELOW_ONE,
    "cooldown": (AtLeast(0),),
    "div_factor": (Above(0), AtMost(1000000)),
    "end_factor": _SHARE,
    "epochs": _STEPS,
    "eps": _SHARE,
    "eta_min": _NOT_NEGATIVE,
    "factor": _PORTION,
    "final_div_factor": (Above(0), AtMost(1000000000000)),
    "gamma": (Above(0), AtMost(10)),
    "last_epoch": (Between(-1, -1),),
    "max_lr": _RATE,
    "max_momentum": _BELOW_ONE,
    "milestones": _STEPS,
    "min_lr": _NOT_NEGATIVE,
    "patience": (AtLeast(0),),
    "pct_start": (Above(0), Below(1)),
    "power": (Between(0, 100),),
    "start_factor": _PORTION,
    "step_size": _STEPS,
    "step_size_down": _STEPS,
    "step_size_up": _STEPS,
    "steps_per_epoch": _STEPS,
    "threshold": _NOT_NEGATIVE,
    "total_iters": _STEPS,
    "total_steps": _STEPS,
}
_TRANSFORMS: dict[str, Bounds] = {
    "alpha": (Above(0), AtMost(10000)),
    "bits": (Between(0, 8),),
    "brightness": _FACTOR,
    "center": (Between(-16384, 16384),),
    "chain_depth": (Between(-1, 16),),
    "contrast": _FACTOR,
    "degrees": _ANGLE,
    "distortion_scale": _SHARE,
    "fill": (Between(0, 255),),
    "hue": (Between(-0.5, 0.5),),
    "kernel_size": (Between(1, 16383),),
    "magnitude": (Between(0, 1000),),
    "max_size": _SIDE,
    "mean": (Between(-1000, 1000),),
    "min_size": _SIDE,
    "mixture_width": (Between(1, 16),),
    "num_magnitude_bins": (Between(2, 1000),),
    "num_ops": (Between(0, 64),),
    "num_output_channels": (Between(1, 3),),
    "num_samples": (Between(1, 1000),),
    "p": _SHARE,
    "padding": (Between(0, 4096),),
    "quality": (Between(1, 100),),
    "ratio": (Above(0), AtMost(1000)),
    "saturation": _FACTOR,
    "scale": (Above(0), AtMost(1000)),
    "scale_range": (Above(0), AtMost(16)),
    "severity": (Between(1, 10),),
    "sharpness_factor": _FACTOR,
    "shear": _ANGLE,
    "side_range": (Between(1, 16),),
    "sigma": (Above(0), AtMost(1000)),
    "size": _SIDE,
    "std": (Above(0), AtMost(1000)),
    "target_size": _SIDE,
    "threshold": (Between(0, 255),),
    "translate": _SHARE,
    "trials": (Between(1, 1000),),
    "value": (Between(-1000, 1000),),
}
# The first pattern that the whole name of a field fits, in any model of transformers.
_MODELS: dict[str, Bounds] = {
    r".*drop.*|.*_prob": _BELOW_ONE,
    r"n(um)?_.*(layers?|heads)|n_layers?|.*_layers|.*_heads": (Between(1, 1024),),
    r"vocab_size": (Between(1, 16777216),),
    r".*_token_id": (Between(0, 16777216),),
    r"max_position_embeddings": (Between(1, 1048576),),
    r"chunk_size_feed_forward": (Between(0, 65536),),
    r"initializer_(range|factor)": (Above(0), AtMost(100)),
    r".*_eps(ilon)?": _PORTION,
    r"num_labels": (Between(0, 1000000),),
    r"(.*_)?(size|dim|channels|stride)|d_.*": (Between(1, 65536),),
}


def bounded(read: Signature, namespace: str) -> Signature:
    """A signature of another package with the bounds of its numbers.

    Args:
        read: the signature as the package has it.
        namespace: `torch.optim`, `torch.optim.lr_scheduler`, `torchvision.transforms.v2` or
            `transformers`.
    """
    elsewhere: Bounds = ()
    if namespace == "torchvision.transforms.v2":
        elsewhere = (Between(-16384, 16384),)
    tables = {
        "torch.optim": _OPTIMIZERS,
        "torch.optim.lr_scheduler": _SCHEDULERS,
        "torchvision.transforms.v2": _TRANSFORMS,
    }
    params = dict(read.params)
    for name, param in params.items():
        if namespace == "transformers":
            bounds = next((b for pattern, b in _MODELS.items() if re.fullmatch(pattern, name)), ())
        else:
            bounds = tables.get(namespace, {}).get(name, elsewhere)
        if bounds:
            params[name] = replace(param, type=_within(param.type, bounds))
    return replace(read, params=params)


def _within(kind: Type, bounds: Bounds) -> Type:
    """A type with bounds on the numbers in it."""
    if kind in NUMBERS or kind == ANY:
        for bound in bounds:
            kind = Marked(kind, bound)
        return kind
    if isinstance(kind, AnyOf):
        return AnyOf(tuple(_within(option, bounds) for option in kind.options))
    if isinstance(kind, ListOf):
        return ListOf(_within(kind.item, bounds), kind.container)
    if isinstance(kind, TupleOf):
        return TupleOf(tuple(_within(item, bounds) for item in kind.items))
    if isinstance(kind, MapOf):
        return MapOf(_within(kind.value, bounds))
    return kind
