"""Low-rank adapters (LoRA) of a frozen encoder, by the package peft."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated

from torch import nn

from vilmedic.config.types import Above, AtMost, Between, Dropout
from vilmedic.errors import ArgumentError, ConfigError, nearest


class LoRA:
    """Low-rank adapters: trains two small matrices per linear layer instead of the encoder.

    A layer computes W x + alpha / rank * B A x, where A has `rank` rows and B as many columns. B
    starts at zero, so that training begins with the encoder as it was (Hu et al. 2021, "LoRA:
    Low-Rank Adaptation of Large Language Models", arXiv 2106.09685). The matrices are trained at
    `trainor.optim_params.lr`, or at the rate that `trainor.optim_groups` gives to their layer.

    Args:
        rank: rows of A and columns of B.
        alpha: strength of what is added, which is multiplied by alpha / rank; null takes twice the
            rank.
        dropout: dropout of x in front of A.
        layers: the linear layers that are adapted, by the ends of their names, such as [query,
            value]; null adapts all of them. Attention of torchvision reads its weights without
            calling a layer and stays as it is.
    """

    def __init__(
        self,
        *,
        rank: Annotated[int, Between(1, 1024)],
        alpha: Annotated[float, Above(0), AtMost(100000)] | None = None,
        dropout: Dropout = 0.0,
        layers: list[str] | None = None,
    ) -> None:
        self.rank = rank
        self.alpha = 2.0 * rank if alpha is None else alpha
        self.dropout = dropout
        self.layers = layers

    def adapt(self, network: nn.Module, what: str, run: Callable[[], object]) -> None:
        """Put adapters beside the linear layers of a network, in place, and freeze the rest.

        Args:
            network: the network, with the weights that it starts from.
            what: its name, for messages.
            run: runs a forward pass. A layer that the network does not call, because it reads the
                weights directly, would be adapted without effect, so it is left out.

        Raises:
            ConfigError: there is no such layer, or peft is not installed.
        """
        names = self._chosen(_called(network, run), what)
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ConfigError(
                "model: lora needs peft: pip install '.[lora]' in the clone."
            ) from error
        network.requires_grad_(False)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            bias="none",
            target_modules="|".join(map(re.escape, names)),
        )
        inject_adapter_in_model(config, network)

    def _chosen(self, called: list[str], what: str) -> list[str]:
        """Return the names of the layers to adapt."""
        if not called:
            raise ArgumentError(
                {
                    "lora": f"{what} has no linear layers that could be adapted. Allowed: encoders "
                    "with linear layers, such as BERT, ViT or ConvNeXt."
                }
            )
        if self.layers is None:
            return called
        if not self.layers:
            raise ArgumentError(
                {"lora.layers": "given an empty list. Leave it out for all layers."}
            )
        ends = sorted({name.rpartition(".")[2] for name in called})
        for wanted in self.layers:
            if not any(_ends(name, wanted) for name in called):
                raise ArgumentError(
                    {
                        "lora.layers": f"no linear layer of {what} has the name '{wanted}'. "
                        f"Allowed: {', '.join(ends)}.{nearest(wanted, ends)}"
                    }
                )
        return [name for name in called if any(_ends(name, one) for one in self.layers)]


def check_alone(freeze: object) -> None:
    """Refuse adapters of an encoder with frozen layers: lora freezes the whole encoder.

    Raises:
        ConfigError: some are.
    """
    if freeze is not False:
        raise ArgumentError(
            {"lora": f"with freeze={freeze}; lora keeps the encoder as it is. Leave freeze out."}
        )


def _ends(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _called(network: nn.Module, run: Callable[[], object]) -> list[str]:
    """Return the names of the linear layers that a forward pass calls, in order."""
    linear = {m: name for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    called: set[nn.Module] = set()
    hooks = [one.register_forward_hook(lambda module, *_: called.add(module)) for one in linear]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [name for module, name in linear.items() if module in called]
