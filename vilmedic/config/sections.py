"""Schema of the framework's own configuration sections: types, defaults, documentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from vilmedic.config.types import (
    Above,
    AtLeast,
    AtMost,
    Below,
    Between,
    Calls,
    Device,
    FolderName,
    Matching,
    NameIn,
    OptionsOf,
    Overruled,
    Portion,
    Seed,
    Temperature,
    UsedWith,
    Within,
)
from vilmedic.errors import ConfigError


@dataclass(kw_only=True)
class TrainorSection:
    """How a model is trained.

    Args:
        optimizer: a class of torch.optim, or LARS.
        optim_params: options of the optimizer.
        optim_groups: options of parts of the model, by name (cnn, encoder, projection), by the
            dotted name of something inside one, or by a pattern of names (*.bias): lr,
            weight_decay, and layer_decay, the factor of the rate from each layer to the one before
            it. A weight takes each option from the last entry that has it.
        batch_size: samples a step takes from the data, before accumulation, in all processes
            together.
        grad_accu: batches whose gradients are averaged into one step.
        clip_grad_norm: largest norm of the gradient; null leaves it as it is.
        lr_decay: a class of torch.optim.lr_scheduler, or WarmupCosineLR; null keeps the learning
            rate.
        lr_decay_params: options of the scheduler. T_max and total_steps are the length of the run
            unless given, and max_lr is optim_params.lr.
        decay_metric_start: first epoch whose evaluation a plateau scheduler sees.
        epochs: number of passes over the training split.
        steps: number of optimizer steps, instead of epochs; null trains by epochs.
        eval_start: first epoch that is evaluated.
        early_stop: evaluations without improvement after which the run ends; null never ends it.
        early_stop_metric: the score that decides on improvement: validation_loss, or split, metric
            and number of a validator metric, as in validation_zero_shot_auroc.
        early_stop_start: first epoch whose evaluation counts for the early stop, and as the best.
        keep: number of best checkpoints that stay on disk; they hold weights only.
        keep_states: number of states after evaluations, the newest ones, that stay on disk as
            state_<step>_<seed>.pth, so that training can be continued from an earlier epoch.
        seed: seed of weights, shuffling, augmentation and dropout; drawn and recorded when null.
        save_every: how often the newest state is saved besides after each evaluation: a number of
            steps (500) or of minutes (15min); null saves after an evaluation only.
        precision: arithmetic of the forward pass; bf16 and fp16 keep weights and optimizer in
            float32, and fp16 scales the loss. auto is bf16 on a GPU that has it and fp32 elsewhere,
            and a run keeps what it began with.
        tf32: on a GPU, compute float32 products in TF32, and let cuDNN time its convolutions and
            take the fastest.
        ema: decay of an averaged copy of the weights (0.999), which is evaluated and saved beside
            the weights themselves, as ema_validation_loss and so on; null keeps none.
        compile: compile the repeated blocks of the model, which takes minutes at first.
        activation_checkpointing: recompute the activations inside the repeated blocks of the model
            in the backward pass, which needs less memory and changes no number.
        parallel: how several processes share the model: ddp gives each the whole of it, fsdp a
            part of each weight, for models that do not fit.
        frozen_cache_gib: largest size in GiB of the cache of frozen encoders' outputs in the run
            directory: where images or reports are the same in every epoch, their outputs are
            computed once; 0 computes them in every epoch.
        sync_bn: compute batch statistics over the samples of all processes instead of each one's.
        device: cpu, cuda, cuda:N or mps (Apple); null takes a CUDA GPU when there is one.
        num_workers: processes that load data; null takes one per core, at most 16.
        max_bad_steps: steps in a row with a loss that is not a number after which the run stops.
        log_every: steps between two lines in metrics.jsonl.
        loggers: where else numbers go, each with its options.
        profile: number of steps, after the first three, whose trace and table of times are written
            to the run directory; null writes none.
    """

    optimizer: Annotated[str, NameIn("torch.optim")] = "Adam"
    optim_params: Annotated[
        dict[str, Any],
        Overruled(
            "lr",
            by="lr_decay_params.max_lr",
            instead="set that one, or leave it out and it is {section}.optim_params.lr",
        ),
        Overruled(
            "momentum",
            by="lr_decay_params.cycle_momentum",
            instead="set base_momentum and max_momentum there, or cycle_momentum=false",
        ),
        OptionsOf("torch.optim", "optimizer"),
    ] = field(default_factory=dict)
    optim_groups: dict[str, dict[str, Annotated[float, Between(0, 1000)]]] = field(
        default_factory=dict
    )
    batch_size: Annotated[int, AtLeast(1)] = 32
    grad_accu: Annotated[int, AtLeast(1)] = 1
    clip_grad_norm: Annotated[float, Above(0), AtMost(1000000)] | None = None
    lr_decay: Annotated[str | None, NameIn("torch.optim.lr_scheduler")] = None
    lr_decay_params: Annotated[
        dict[str, Any],
        Overruled("epochs", by="lr_decay_params.total_steps", instead="leave one of them out"),
        Overruled(
            "steps_per_epoch", by="lr_decay_params.total_steps", instead="leave one of them out"
        ),
        OptionsOf(
            "torch.optim.lr_scheduler", "lr_decay", filled=("T_max", "total_steps", "max_lr")
        ),
    ] = field(default_factory=dict)
    decay_metric_start: Annotated[
        int,
        UsedWith("lr_decay", ("ReduceLROnPlateau",)),
        Within("epochs", unless="steps"),
        AtLeast(0),
    ] = 0
    epochs: Annotated[int, UsedWith("steps", (None,)), AtLeast(0)] = 99
    steps: Annotated[int, AtLeast(1)] | None = None
    eval_start: Annotated[int, Within("epochs", unless="steps"), AtLeast(0)] = 0
    early_stop: Annotated[int, AtLeast(1)] | None = None
    early_stop_metric: str = "validation_loss"
    early_stop_start: Annotated[
        int, UsedWith("early_stop"), Within("epochs", unless="steps"), AtLeast(0)
    ] = 0
    keep: Annotated[int, AtLeast(1)] = 3
    keep_states: Annotated[int, AtLeast(0)] = 0
    seed: Seed | None = None
    save_every: (
        Annotated[str, Matching("[1-9][0-9]*(min)?", "steps (500) or minutes (15min)")] | None
    ) = "15min"
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    tf32: bool = True
    ema: Annotated[float, AtLeast(0), Below(1)] | None = None
    compile: bool = False
    activation_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    frozen_cache_gib: Annotated[float, AtLeast(0), AtMost(1048576)] = 32.0
    sync_bn: bool = False
    device: Device | None = None
    num_workers: Annotated[int, Between(0, 256)] | None = None
    max_bad_steps: Annotated[int, AtLeast(1)] = 10
    log_every: Annotated[int, AtLeast(1)] = 10
    loggers: Annotated[list[Any], Calls("logger")] = field(default_factory=lambda: ["tensorboard"])
    profile: Annotated[int, AtLeast(1)] | None = None


@dataclass(kw_only=True)
class ValidatorSection:
    """How a model is scored during training.

    Args:
        batch_size: samples per batch; a contrastive loss depends on it.
        every: how often the model is scored: a number of steps (50), or of epochs (1epoch,
            2epochs); and in any case at the end of the run.
        splits: the splits that are scored; the first one decides on improvement.
        metrics: protocols to compute besides the loss, each with its options.
        post_processing: figures to make at each evaluation, each with its options.
    """

    batch_size: Annotated[int, AtLeast(1)] = 32
    every: Annotated[
        str, Matching("[1-9][0-9]*(epochs?)?", "steps (50) or epochs (1epoch, 2epochs)")
    ] = "1epoch"
    splits: list[str] = field(default_factory=lambda: ["validate"])
    metrics: Annotated[dict[str, Any], Calls("metric")] = field(default_factory=dict)
    post_processing: Annotated[dict[str, Any], Calls("post_processing")] = field(
        default_factory=dict
    )


@dataclass(kw_only=True)
class RerankSection:
    """Ranking of generated images.

    Args:
        ckpt: a checkpoint of ConVIRT, a path: images that agree with the report come first.
    """

    ckpt: str | None = None


@dataclass(kw_only=True)
class GenerationSection:
    """How images are generated from reports.

    Args:
        generate_images: make images of reports, instead of an evaluation.
        num_images: images per report.
        num_samples: reports of each split, from the first on.
        prompt: a report, or a list of reports, to use instead of those of the splits.
        temperature: divides the logits; below 1 images become more alike, above 1 more varied.
        filter_thres: share of the logits that is dropped at each token, the smallest ones; it
            counts the text vocabulary too.
        top_p: keep the likeliest tokens that together have this probability; 1 keeps all.
        cond_scale: guidance by the text; 1 is none, 3 is strong. Needs training with
            model.dalle.null_cond_prob above 0.
        prime: share of the image, from the top, whose tokens are those of a real image; below 1, as
            something has to be left to draw.
        prime_image: the file of that real image; null takes the image of the report.
        rerank: puts the images of a report in order, best first.
    """

    generate_images: bool = False
    num_images: Annotated[int, UsedWith("generate_images", mode=True), Between(1, 65536)] = 4
    num_samples: Annotated[
        int, UsedWith("generate_images", mode=True), UsedWith("prompt", (None,)), AtLeast(1)
    ] = 1
    prompt: Annotated[str | list[str] | None, UsedWith("generate_images", mode=True)] = None
    temperature: Annotated[Temperature, UsedWith("generate_images", mode=True)] = 1.0
    filter_thres: Annotated[float, UsedWith("generate_images", mode=True), AtLeast(0), Below(1)] = (
        0.9
    )
    top_p: Annotated[Portion, UsedWith("generate_images", mode=True)] = 1.0
    cond_scale: Annotated[float, UsedWith("generate_images", mode=True), Between(0, 1000)] = 1.0
    prime: Annotated[float, UsedWith("generate_images", mode=True), AtLeast(0), Below(1)] = 0.0
    prime_image: Annotated[
        str | None, UsedWith("generate_images", mode=True), UsedWith("prime")
    ] = None
    rerank: Annotated[RerankSection, UsedWith("generate_images", mode=True)] = field(
        default_factory=RerankSection
    )

    def __post_init__(self) -> None:
        """Read the nested section, and refuse options that cannot be used.

        Raises:
            ConfigError: a prompt is empty, or there is no image to take a part of.
        """
        if isinstance(self.rerank, dict):
            self.rerank = RerankSection(**self.rerank)
        problems = []
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if prompts is not None and not all(prompt.strip() for prompt in prompts or [""]):
            problems.append("ensemblor.prompt: is empty; allowed: a report, or a list of reports.")
        if self.prime and prompts and self.prime_image is None:
            problems.append(
                "ensemblor.prime: needs a real image, and a prompt has none. Name one with "
                "ensemblor.prime_image."
            )
        if problems:
            raise ConfigError(problems)


@dataclass(kw_only=True)
class EnsemblorSection(GenerationSection):
    """How trained checkpoints are evaluated, or images generated.

    Args:
        mode: which checkpoints of the run are used: best-1, best-N or all, over all its seeds.
        ckpt: one checkpoint to evaluate instead, a path or a file in the run directory, or last.
        rank_by: the score that best-N goes by, where the run has best checkpoints of several; null
            takes the one that their files name.
        changed: what happens when the command line gives a key of the model, the tokenizer or the
            pixels that is not as it was in training: an error, or allow, which the results note.
        ema: evaluate the averaged weights that trainor.ema kept.
        splits: the splits that are evaluated.
        batch_size: samples per batch; a contrastive loss depends on it.
        metrics: protocols to compute besides the loss, each with its options.
        baselines: what is measured beside the model in the same run: the same network untrained,
            and the pixels themselves.
        post_processing: figures and files to make, each with its options.
        report: whether report.html is made, with the embedding explorer of
            post_processing.explore_representation.
        seed: seed of all random draws of an evaluation.
        precision: arithmetic of the forward pass; auto is bf16 on a GPU that has it, and fp32
            elsewhere.
        tf32: see trainor.tf32.
        device: cpu, cuda, cuda:N or mps (Apple); null takes a CUDA GPU when there is one.
        num_workers: processes that load data; null takes one per core, at most 16.
    """

    mode: Annotated[
        str, UsedWith("ckpt", (None,)), Matching("best-[1-9][0-9]*|all", "best-1, best-N or all")
    ] = "best-1"
    ckpt: str | None = None
    rank_by: str | None = None
    changed: Literal["refuse", "allow"] = "refuse"
    ema: bool = False
    splits: list[str] = field(default_factory=lambda: ["validate", "test"])
    batch_size: Annotated[int, AtLeast(1)] = 32
    metrics: Annotated[
        dict[str, Any], UsedWith("generate_images", (False,), mode=True), Calls("metric")
    ] = field(default_factory=lambda: {"retrieval": {}})
    baselines: Annotated[
        list[Literal["untrained", "raw_pixels"]], UsedWith("generate_images", (False,), mode=True)
    ] = field(default_factory=list)
    post_processing: Annotated[
        dict[str, Any], UsedWith("generate_images", (False,), mode=True), Calls("post_processing")
    ] = field(default_factory=dict)
    report: bool = True
    seed: Seed = 0
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    tf32: bool = True
    device: Device | None = None
    num_workers: Annotated[int, Between(0, 256)] | None = None


@dataclass(kw_only=True)
class RunSection:
    """The whole configuration.

    `dataset` and `model` are nodes with a `proto`: their keys are the arguments of the class named.

    Args:
        name: the run's name; null takes the stem of the configuration file.
        ckpt_dir: where runs are written: `<ckpt_dir>/<name>`.
        ckpt: a checkpoint, a path or a file in the run directory, or last for its newest state:
            training continues from it, evaluation uses it instead of the best ones. With auto,
            training continues if there is something to continue and starts a new run otherwise.
        plugins: modules to import first, so that what they register can be named.
        dataset: the data set.
        model: the model.
        trainor: how it is trained.
        validator: how it is scored during training.
        ensemblor: how trained checkpoints are evaluated.
    """

    name: Annotated[str, FolderName()] | None = None
    ckpt_dir: str = "ckpt"
    ckpt: str | None = None
    plugins: list[str] = field(default_factory=list)
    dataset: Annotated[dict[str, Any], NameIn("dataset")]
    model: Annotated[dict[str, Any], NameIn("model")]
    trainor: TrainorSection = field(default_factory=TrainorSection)
    validator: ValidatorSection = field(default_factory=ValidatorSection)
    ensemblor: EnsemblorSection = field(default_factory=EnsemblorSection)
