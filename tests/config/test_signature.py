from __future__ import annotations

import pytest

from tests.config.conftest import Project
from vilmedic.config.namespaces import OWN, names, schema_keys, signature
from vilmedic.config.signature import Signature, derives_from, find_object, read_signature
from vilmedic.config.transformers_fields import config_signature
from vilmedic.config.types import (
    AnyOf,
    AtLeast,
    Basic,
    Choice,
    ConfigOf,
    Instance,
    ListOf,
    Marked,
    TupleOf,
)


def read(path: str) -> Signature:
    found = read_signature(path)
    assert found is not None
    return found


@pytest.fixture
def parts(project: Project) -> str:
    project.load()
    return f"{project.package}.parts"


def test_arguments_have_types_defaults_and_docs(parts: str) -> None:
    net = read(f"{parts}:Net")
    assert list(net.params) == ["backbone", "permute", "freeze", "dropout", "width"]
    assert net.params["backbone"].required
    assert net.params["permute"].type == Choice(("batch_first", "none"))
    assert net.params["permute"].default == "batch_first"
    assert net.params["width"].type == Marked(Basic("int"), AtLeast(1))
    assert net.docs()["permute"] == "the order of its axes, on two lines."
    assert net.summary == "Pixels to features."


def test_names_are_resolved_through_imports(parts: str) -> None:
    pair = read(f"{parts}:Pair")
    assert pair.params["net"].type == Instance(f"{parts}.Net")
    assert pair.params["spec"].runtime
    assert "spec" not in pair.settable
    # an alias of the module, and an import for type checkers only
    assert pair.params["sides"].type == AnyOf((Basic("int"), TupleOf((Basic("int"), Basic("int")))))
    assert pair.params["where"].type == AnyOf((Basic("path"), Basic("null")))
    assert pair.params["parts"].type == AnyOf((ListOf(Instance(f"{parts}.Near")), Basic("null")))
    encoder = read(f"{parts}:Encoder")
    assert encoder.extras == Marked(Basic("any"), ConfigOf("bert", key="proto"))


def test_keyword_arguments_are_inherited_from_the_base_class(parts: str) -> None:
    wide = read(f"{parts}:WideNet")
    assert list(wide.params)[:2] == ["factor", "backbone"]
    assert wide.extras is None
    assert wide.docs()["backbone"] == "the architecture."
    assert derives_from(f"{parts}.WideNet", f"{parts}.Net")
    assert not derives_from(f"{parts}.Net", f"{parts}.WideNet")


def test_relative_imports_and_reexports_are_followed(project: Project) -> None:
    top = project.package
    project.write(f"{top}/deep/__init__.py", "from .one import *\nfrom ..parts import Near as N\n")
    project.write(f"{top}/deep/one.py", "class Star:\n    def __init__(self, *, a: int): ...\n")
    assert list(read(f"{top}.deep:Star").params) == ["a"]
    found = find_object(f"{top}.deep.N")
    assert found is not None
    assert found.path == f"{top}.parts.Near"
    assert read_signature(f"{top}.deep:Nothing") is None
    assert read_signature("no_such_package.module:Class") is None


def test_dataclasses_are_read_as_their_fields() -> None:
    trainor = read("vilmedic.config.sections:TrainorSection")
    assert trainor.params["optim_params"].default == {}
    assert trainor.params["batch_size"].default == 32
    ensemblor = read("vilmedic.config.sections:EnsemblorSection")
    assert ensemblor.params["splits"].default == ["validate", "test"]
    assert set(ensemblor.docs()) == set(ensemblor.params)
    assert set(trainor.docs()) == set(trainor.params)


def test_all_keys_of_the_schema(project: Project) -> None:
    config = project.load()
    keys = schema_keys(read("vilmedic.config.sections:RunSection"), config.data)
    assert keys.index("trainor") < keys.index("trainor.batch_size")
    assert {"model.net.backbone", "dataset.root", "ensemblor.mode"} <= set(keys)


def test_torch_signatures_are_read_without_importing_torch() -> None:
    assert {"Adam", "RAdam", "SGD", "AdamW"} <= set(names("torch.optim"))
    schedulers = names("torch.optim.lr_scheduler")
    assert {"ReduceLROnPlateau", "CosineAnnealingLR", "StepLR", "OneCycleLR"} <= set(schedulers)
    assert not {"LRScheduler", "LambdaLR", "SequentialLR", "ChainedScheduler"} & set(schedulers)
    adam = signature("torch.optim", "Adam")
    assert adam is not None
    assert "params" not in adam.params
    assert {"lr", "betas", "eps", "weight_decay"} <= set(adam.params)
    plateau = signature("torch.optim.lr_scheduler", "ReduceLROnPlateau")
    assert plateau is not None
    assert "optimizer" not in plateau.params


@pytest.mark.parametrize("namespace", ["torch.optim", "torch.optim.lr_scheduler"])
def test_static_signatures_agree_with_imported_ones(namespace: str) -> None:
    import inspect
    from pydoc import locate

    for name in names(namespace):
        found = signature(namespace, name)
        assert found is not None
        path = OWN[namespace].get(name, f"{namespace}.{name}")
        expected = list(inspect.signature(locate(path)).parameters)[1:]
        # constants of Muon's method are not settable
        assert list(found.params) == [one for one in expected if one != "ns_coefficients"], name


def test_transforms_with_and_without_arguments() -> None:
    flip = signature("torchvision.transforms.v2", "RandomHorizontalFlip")
    assert flip is not None
    assert list(flip.params) == ["p"]
    to_image = signature("torchvision.transforms.v2", "ToImage")
    assert to_image is not None
    assert not to_image.params


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "xlm-roberta"])
def test_settings_agree_with_the_configuration_class(model_type: str) -> None:
    from transformers import AutoConfig

    found = config_signature(model_type)
    assert found is not None
    config = AutoConfig.for_model(model_type)
    public = {name for name in config.to_dict() if not name.startswith("_")}
    assert public <= set(found.params)
    assert config_signature("no_such_model") is None
