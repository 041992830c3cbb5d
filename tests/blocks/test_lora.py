from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import SwinTransformer
from transformers import ViTConfig, ViTModel

from tests.small_models import tiny_cnn, tiny_convirt, tiny_encoder, tiny_spec
from vilmedic.blocks.lora import LoRA
from vilmedic.blocks.pretrained import Filled
from vilmedic.blocks.text import WordEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.checkpoints.adapters import has_adapters, without_adapters
from vilmedic.checkpoints.checkpoint import load_weights, weights_of
from vilmedic.checkpoints.encoders import read_encoder
from vilmedic.config.sections import TrainorSection
from vilmedic.errors import ArgumentError, CheckpointError, ConfigError
from vilmedic.models.classifier import Classifier
from vilmedic.training.optimization import make_optimizer

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 16,
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**VIT)).save_pretrained(folder)
    return str(folder)


def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def report() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[2, 4, 5, 6, 7, 8, 9, 3], [2, 9, 5, 3, 0, 0, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def trained(module: nn.Module) -> nn.Module:
    """The module with non-zero adapters."""
    torch.manual_seed(1)
    for name, value in module.named_parameters():
        if value.requires_grad:
            assert ".lora_" in name
            nn.init.normal_(value, std=0.2)
    return module.eval()


def stored(encoder: nn.Module, part: str, lora: dict[str, Any]) -> dict[str, Any]:
    """The state of a run with this encoder."""
    weights = {f"{part}.{name}": value for name, value in encoder.state_dict().items()}
    return {
        "model": weights,
        "ema": {name: value * 0.5 for name, value in weights.items()},
        "config": {"model": {"proto": "ConVIRT", part: {"freeze": False, "lora": lora}}},
        "optimizer": {},
    }


@pytest.mark.parametrize(
    ("kind", "alpha"), [("bert", None), ("bert", 3.0), ("vit", None), ("vit", 3.0)]
)
def test_merged_weights_give_the_features_of_the_adapted_encoder(
    kind: str, alpha: float | None, vit: str
) -> None:
    lora = LoRA(rank=2, alpha=alpha)
    given: dict[str, Any] = {"rank": 2} if alpha is None else {"rank": 2, "alpha": alpha}
    torch.manual_seed(0)
    adapted: Any
    plain: Any
    if kind == "bert":
        part, adapted, plain = "encoder", tiny_encoder(lora=lora), tiny_encoder()
    else:
        part, adapted = "cnn", VisionEncoder(backbone=vit, lora=lora)
        plain = VisionEncoder(backbone=vit)

    @torch.no_grad()
    def features(encoder: Any) -> torch.Tensor:
        encoder.eval()
        return encoder(**report()) if part == "encoder" else encoder.pooled(images())

    before = features(adapted)
    names = plain.state_dict().keys()
    best = weights_of(stored(trained(adapted), part, given))
    assert "optimizer" not in best
    assert best["config"] == {"model": {"proto": "ConVIRT", part: {"freeze": False}}}
    assert best["model"].keys() == best["ema"].keys() == {f"{part}.{name}" for name in names}
    plain.load_state_dict({n.removeprefix(f"{part}."): v for n, v in best["model"].items()})
    after = features(plain)
    assert float((after - before).abs().max()) > 1e-2
    torch.testing.assert_close(after, features(adapted), rtol=0, atol=1e-6)
    assert without_adapters(best) is best


def test_layers_whose_weights_are_read_directly_get_no_adapters() -> None:
    """The attention of torchvision's Swin uses the weights of its linear layers directly."""
    sizes = {"patch_size": [4, 4], "window_size": [4, 4], "embed_dim": 8}
    swin = SwinTransformer(**sizes, depths=[2], num_heads=[1], num_classes=2)
    LoRA(rank=1).adapt(swin, "a Swin", lambda: swin(images()[:1]))
    adapted = [name for name in swin.state_dict() if ".lora_A" in name]
    assert any(".mlp.0." in name for name in adapted)
    assert not any(".attn." in name for name in adapted)


def test_only_adapters_are_trained_and_start_as_identity(
    vit: str,
) -> None:
    plain = VisionEncoder(backbone=vit).eval()
    adapted = VisionEncoder(backbone=vit, lora=LoRA(rank=2)).eval()
    assert torch.equal(adapted.pooled(images()), plain.pooled(images()))
    own = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert own == {name for name in adapted.state_dict() if ".lora_" in name}
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted.train().pooled(images()).square().sum().backward()
        optimizer.step()
    for name, value in adapted.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in own), name


def test_layers_are_selected_by_name_suffix(vit: str) -> None:
    encoder = tiny_encoder(lora=LoRA(rank=2, layers=["query", "attention.output.dense"]))
    adapted = {name.split(".lora_")[0] for name in encoder.state_dict() if ".lora_" in name}
    layer = "network.encoder.layer.0.attention"
    assert adapted == {f"{layer}.self.query", f"{layer}.output.dense"}
    with pytest.raises(ArgumentError, match=r"lora\.layers: no linear layer .*'qeury'.*'query'"):
        tiny_encoder(lora=LoRA(rank=2, layers=["qeury"]))


def test_an_encoder_without_linear_layers_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"lora: shufflenet_v2_x0_5 has no linear layers"):
        tiny_cnn(lora=LoRA(rank=2))


def test_a_list_without_layers_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"lora\.layers: given an empty list\. Leave it out"):
        tiny_encoder(lora=LoRA(rank=2, layers=[]))


def test_freeze_together_with_lora_is_refused(vit: str) -> None:
    for freeze in (True, 1):
        with pytest.raises(ArgumentError, match=r"lora: with freeze=.*Leave freeze out"):
            tiny_encoder(lora=LoRA(rank=2), freeze=freeze)
        with pytest.raises(ArgumentError, match=r"lora: with freeze=.*Leave freeze out"):
            VisionEncoder(backbone=vit, lora=LoRA(rank=2), freeze=freeze)
    cnn = VisionEncoder(backbone=vit, lora=LoRA(rank=2))
    with pytest.raises(ArgumentError, match=r"freeze: given 'all' beside cnn\.lora"):
        Classifier(spec=tiny_spec(labels=["a", "b"]), cnn=cnn, freeze="all")


@pytest.fixture
def no_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def imported(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "peft":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", imported)


@pytest.mark.usefixtures("no_peft")
def test_without_peft_the_extra_is_named_and_checkpoints_load() -> None:
    with pytest.raises(ConfigError, match=r"lora needs peft: pip install '\.\[lora\]'"):
        tiny_encoder(lora=LoRA(rank=2))
    encoder = tiny_encoder(lora=LoRA(rank=2), filled=Filled())
    assert not has_adapters(encoder.state_dict())


def test_a_model_without_adapters_loads_merged_weights(tmp_path: Path) -> None:
    spec = tiny_spec()
    adapted = tiny_convirt(spec)
    adapted.encoder = tiny_encoder(spec, lora=LoRA(rank=2, alpha=6.0))
    for value in adapted.encoder.parameters():
        if value.requires_grad:
            nn.init.normal_(value, std=0.2)
    adapted.eval()
    config = {"model": {"proto": "ConVIRT", "encoder": {"lora": {"rank": 2, "alpha": 6.0}}}}
    state = {"model": adapted.state_dict(), "config": config, "data": spec.to_plain()}
    plain = tiny_convirt(spec).eval()
    load_weights(plain, state, Path("last_0.pth"))
    torch.testing.assert_close(
        plain.encoder(**report()), adapted.encoder(**report()), rtol=1e-6, atol=1e-6
    )
    again = tiny_convirt(spec)
    again.encoder = tiny_encoder(spec, lora=LoRA(rank=2, alpha=6.0))
    load_weights(again, state, Path("last_0.pth"))
    assert all(torch.equal(v, state["model"][n]) for n, v in again.state_dict().items())

    torch.save(state, tmp_path / "last_0.pth")
    tuned = tiny_encoder(spec, pretrained=str(tmp_path / "last_0.pth")).eval()
    assert torch.equal(tuned(**report()), plain.encoder(**report()))
    more = tiny_encoder(spec, pretrained=str(tmp_path / "last_0.pth"), lora=LoRA(rank=4)).eval()
    assert torch.equal(more(**report()), plain.encoder(**report()))


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["config"]["model"]["encoder"].pop("lora"),
        lambda state: state["config"]["model"]["encoder"].update(lora={"rank": 0, "alpha": 1}),
        lambda state: state["config"].pop("model"),
        lambda state: state["model"].pop(next(n for n in state["model"] if ".lora_B." in n)),
        lambda state: state["model"].update(
            {n: v[:, :-1] for n, v in state["model"].items() if ".lora_A." in n}
        ),
    ],
)
def test_damaged_adapters_are_reported(damage: Callable[[dict[str, Any]], Any]) -> None:
    state = stored(tiny_encoder(lora=LoRA(rank=2)), "encoder", {"rank": 2})
    damage(state)
    with pytest.raises(CheckpointError, match=r"a\.pth: is damaged: .*adapters"):
        without_adapters(state, Path("a.pth"))


def test_word_encoder_supports_adapters() -> None:
    spec = tiny_spec()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = WordEncoder(
        spec=spec, last_n_layers=2, lora=LoRA(rank=2), intermediate_size=32, **sizes
    )
    ids = report()
    words = ids["attention_mask"].cumsum(1) - 1
    words[ids["attention_mask"] == 0] = -1
    before = encoder.eval()(**ids, word_ids=words).report.detach()
    trained(encoder)
    after = encoder(**ids, word_ids=words).report.detach()
    assert float((after - before).abs().max()) > 1e-2


def test_parameter_groups_assign_adapters_to_their_layer() -> None:
    model = tiny_convirt()
    model.encoder = tiny_encoder(num_hidden_layers=3, lora=LoRA(rank=2))
    section = TrainorSection(
        optimizer="AdamW",
        optim_params={"lr": 0.5},
        optim_groups={"encoder": {"lr": 0.1, "layer_decay": 0.5}},
    )
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {
        names[id(p)]: group["lr"]
        for group in make_optimizer(model, section).param_groups
        for p in group["params"]
    }
    own = {name: rate for name, rate in rates.items() if name.startswith("encoder.")}
    assert own
    assert all(".lora_" in name for name in own)
    for number, rate in enumerate((0.025, 0.05, 0.1)):
        assert {r for n, r in own.items() if f".layer.{number}." in n} == {rate}


def test_an_encoder_with_adapters_initialises_a_plain_network(tmp_path: Path) -> None:
    state = stored(trained(tiny_encoder(lora=LoRA(rank=2))), "encoder", {"rank": 2})
    torch.save(state, tmp_path / "last_0.pth")
    plain = tiny_encoder()
    file = read_encoder("pretrained", str(tmp_path / "last_0.pth"), "encoder", plain.network)
    assert file.weights.keys() == plain.network.state_dict().keys()
