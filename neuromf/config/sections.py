"""The sections of a run's settings, each checked in itself; what crosses sections is checked in `schema`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class UNetConfig(_Section):
    """The MAISI U-Net."""

    name: Literal["maisi-unet"] = "maisi-unet"
    channels: tuple[Count, ...] = (64, 128, 256, 512)
    attention_levels: tuple[bool, ...] = (False, False, True, True)
    head_channels: Count = 32
    res_blocks: Count = 2
    norm_groups: Count = 32
    conditioning: Literal["t+h", "r+t", "h", "t", "decoupled"] = "t+h"
    """Which times are embedded; `t` is a flow model, `decoupled` shows t to the encoder and r to the decoder."""
    time_scale: Positive = 1.0
    t_scale: Positive = 1.0
    """Factor on t alone; 1000 for NVIDIA's rectified-flow weights."""
    spacing_mm: tuple[Positive, Positive, Positive] | None = None
    """The volumes' spacing as an input, which NVIDIA's weights need; null leaves it out."""
    patch: Count = 1
    """Fold blocks of patch^3 latent cells into channels (a cheap, wide network for CPUs)."""
    pad: bool = False
    places: bool = False
    """Learn a value per place, for scans that lie alike on one grid; a short training needs it to know where it is."""
    precondition: bool = False
    """Give an x-prediction EDM's skip from its input (network output c_skip z + c_out F)."""
    v_head_blocks: Whole = 0
    """Residual blocks of a second head that predicts the instantaneous velocity in training."""
    classes: bool = False
    """Take the class of the latents as an input."""
    guidance: bool = False
    """Take a guidance scale and interval as inputs."""

    @model_validator(mode="after")
    def _consistent(self) -> UNetConfig:
        if len(self.channels) != len(self.attention_levels):
            raise ValueError(
                f"network.channels has {len(self.channels)} levels and network.attention_levels "
                f"{len(self.attention_levels)}: give one entry per level in both"
            )
        uneven = [c for c in self.channels if c % self.norm_groups]
        if uneven:
            raise ValueError(f"network.norm_groups={self.norm_groups} does not divide channels {uneven}")
        return self


class MitConfig(_Section):
    """Improved MeanFlow's transformer in three dimensions."""

    name: Literal["mit"]
    size: Literal["B", "M", "L", "XL"] | None = "B"
    """A published size; null takes depth, width and heads."""
    depth: Count = 12
    width: Count = 768
    heads: Count = 12
    patch: Count = 4
    time_token: bool = False
    """Also give t as tokens, not h alone."""
    precondition: bool = False
    v_head_blocks: Whole = 8
    """How many of the blocks stand in two branches, for u and for the instantaneous velocity."""
    classes: bool = False
    guidance: bool = False


class MlpConfig(_Section):
    """A plain network for points."""

    name: Literal["mlp"]
    width: Count = 256
    depth: Count = 4
    conditioning: Literal["t+h", "r+t", "h"] = "t+h"
    precondition: bool = False
    v_head_blocks: Whole = 0
    classes: bool = False
    guidance: bool = False


NETWORKS: dict[str, type[UNetConfig | MitConfig | MlpConfig]] = {
    "maisi-unet": UNetConfig,
    "mit": MitConfig,
    "mlp": MlpConfig,
}


def _network_name(value: Any) -> str:
    """The backbone a section is for; presets that name none mean the U-Net."""
    return value.get("name", "maisi-unet") if isinstance(value, dict) else getattr(value, "name", "")


NetworkConfig = Annotated[
    Annotated[UNetConfig, Tag("maisi-unet")] | Annotated[MitConfig, Tag("mit")] | Annotated[MlpConfig, Tag("mlp")],
    Discriminator(
        _network_name,
        custom_error_type="no_network",
        custom_error_message=f"no such network; available: {', '.join(NETWORKS)}",
    ),
]


class ObjectiveConfig(_Section):
    """What is minimised; symbols as in the papers."""

    name: Literal["imf", "meanflow", "pmf", "rectflow", "alphaflow"] = "imf"
    prediction: Literal["u", "x"] = "x"
    t_min: Share = 0.01
    tangent: Literal["boundary", "v-head"] = "boundary"
    """Where imf and pmf take dz/dt from: the network at r = t, or its second head."""
    vhead_weight: Annotated[float, Field(ge=0)] = 1.0
    derivative: Literal["exact", "finite-difference"] = "exact"
    fd_step: Positive = 1e-3
    lp: Positive | tuple[Positive, ...] = 2.0
    loss_reduction: Literal["sum", "mean"] = "mean"
    norm_p: Annotated[float, Field(ge=0)] = 0.5
    norm_eps: Positive = 1.0
    fm_weight: Annotated[float, Field(ge=0)] = 0.0
    channel_weights: Literal["none", "precision", "variance", "learned"] | tuple[Positive, ...] = "none"
    """precision: 1 / sigma_c^2 of the latents; variance: sigma_c^2, errors as large as the autoencoder sees them."""
    alpha_schedule: tuple[Share, Share] | None = None
    """Shares of the training between which alphaflow's flow_alpha falls from one to zero."""
    alpha_slope: Positive = 25.0
    perceptual_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of pmf's perceptual distance between decoded crops of x_hat and of the data."""
    perceptual_t_max: Share = 0.8
    perceptual_crop: Count = 8
    """Edge of the decoded crop, in latent cells."""

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        if self.prediction == "x" and self.t_min == 0:
            raise ValueError("objective.t_min=0 divides by zero with prediction 'x': use 0.01 to 0.05")
        if self.name == "pmf" and self.prediction != "x":
            raise ValueError("objective.name=pmf compares data estimates: it needs objective.prediction=x")
        if self.name == "pmf" and self.t_min == 0:
            raise ValueError("objective.t_min=0 divides pmf's target by zero: use 0.05, as its authors do")
        if self.tangent == "v-head" and self.name not in ("imf", "pmf"):
            raise ValueError(f"objective.tangent=v-head belongs to imf and pmf, not to {self.name}")
        if (self.name == "alphaflow") != (self.alpha_schedule is not None):
            raise ValueError(
                "objective.name=alphaflow needs objective.alpha_schedule, such as [0.0, 1.0]"
                if self.alpha_schedule is None
                else f"objective.alpha_schedule belongs to alphaflow, not to {self.name}: set it to null"
            )
        if self.alpha_schedule and self.alpha_schedule[0] >= self.alpha_schedule[1]:
            raise ValueError(f"objective.alpha_schedule={list(self.alpha_schedule)} must rise, such as [0.0, 1.0]")
        if self.channel_weights == "learned" and self.norm_p >= 1:
            raise ValueError(
                f"objective.channel_weights=learned grow without end under objective.norm_p={self.norm_p:g}, which "
                "scales their losses away: use 0.5 or less"
            )
        if self.perceptual_weight and self.prediction != "x":
            raise ValueError("objective.perceptual_weight compares decoded data estimates: it needs prediction x")
        return self


class GuidanceConfig(_Section):
    """Training that builds classifier-free guidance into the one evaluation; needs latents with classes."""

    enabled: bool = False
    label_drop: Share = 0.1
    omega: Positive = 1.0
    """meanflow: weight of v_c in the guided velocity."""
    kappa: Share = 0.0
    """meanflow: weight of the network's own class-conditional velocity."""
    interval: tuple[Share, Share] = (0.0, 1.0)
    """meanflow: times inside which guidance acts."""
    omega_max: Annotated[float, Field(gt=1)] = 8.0
    """imf and pmf: scales are drawn from 1 to this, with a density that falls as omega^-omega_beta."""
    omega_beta: Positive = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> GuidanceConfig:
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"guidance.interval={list(self.interval)}: the lower time comes first")
        return self


class TimesConfig(_Section):
    """How the pairs (r, t) are drawn."""

    distribution: Literal["logit-normal", "uniform"] = "logit-normal"
    mean: float = -0.4
    std: Positive = 1.0
    r_mean: float | None = None
    r_std: Positive | None = None
    uniform_share: Share = 0.0
    one_step_share: Share = 0.0
    """Share of the r < t samples whose pair is exactly (r, t) = (0, 1), the one that 1-NFE sampling uses."""
    data_proportion: Share = 0.75
    order: Literal["sort-then-mask", "mask-then-sort", "min"] = "sort-then-mask"
    gap_start: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Largest t - r at the first update."""
    gap_curriculum: Share = 0.0
    """Share of the training over which the largest t - r grows from gap_start to 1."""

    @model_validator(mode="after")
    def _consistent(self) -> TimesConfig:
        if (self.gap_start < 1) != (self.gap_curriculum > 0):
            raise ValueError("set times.gap_start below 1 and times.gap_curriculum above 0 together, or neither")
        return self


class TrainingConfig(_Section):
    """The optimisation."""

    seed: int = 0
    epochs: Count | None = None
    updates: Count | None = None
    batch_size: Count = 16
    """Samples per process and micro-batch."""
    accumulation: Count = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices by Muon, everything else by AdamW."""
    muon_momentum: Share = 0.95
    muon_scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    lr: Positive = 1e-4
    lr_final: Annotated[float, Field(ge=0)] = 1e-6
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: Whole = 100
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Positive | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    recompute: bool = False
    """Activation checkpointing: keep no activations inside the network's blocks, and run them twice."""
    augmentation: Literal["auto"] | bool = "auto"
    """Also train on the copies that `encode --copies N` and `--flip-copies` made; auto: where they exist."""
    workers: Whole = 0
    init_from: str | None = None
    """A run to start from: the same network, or a flow model that gets a second time; or NVIDIA's file of a
    rectified-flow U-Net."""
    init_contrast: str = "T1"
    """Which of the contrasts of NVIDIA's file a network without classes starts as."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        """Settings written before there were other copies than flipped ones call `augmentation` flip."""
        if isinstance(values, dict) and "flip" in values:
            if "augmentation" in values:
                raise ValueError("training.flip is called training.augmentation now: give that one alone")
            values = {**values, "augmentation": values["flip"]}
            del values["flip"]
        return values

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.epochs is None) == (self.updates is None):
            raise ValueError("set exactly one of training.epochs and training.updates (the other to null)")
        return self


class EmaConfig(_Section):
    """Moving averages of the weights; all are saved, one is selected for validation and sampling."""

    decays: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.9995, 0.999, 0.9999)
    half_lives_kimg: tuple[Positive, ...] = ()
    """Half-lives in thousands of images, ramped up at the start as in EDM."""
    every: Count = 1
    """Update the averages every n updates, with decay^n."""
    select: float | str = 0.9995
    """The one that validation and samples use: a decay, or a half-life as in `500kimg`."""

    @property
    def names(self) -> list[str]:
        """How the averages are called in checkpoints and on the command line."""
        return [f"{decay:g}" for decay in self.decays] + [f"{kimg:g}kimg" for kimg in self.half_lives_kimg]

    @property
    def selected(self) -> str:
        """The name of the selected average."""
        return self.select if isinstance(self.select, str) else f"{self.select:g}"

    @model_validator(mode="after")
    def _known(self) -> EmaConfig:
        if self.selected not in self.names:
            raise ValueError(f"ema.select={self.select} is not among the averages {', '.join(self.names)}")
        return self


class IntervalsConfig(_Section):
    """How often the costly things happen, in epochs; checkpoints also by updates."""

    validation: Count = 10
    samples: Count = 25
    sample_count: Count = 4
    diagnostics: Count = 10
    """The costly figures: the raw loss by channel."""
    checkpoint_updates: Count = 500
    keep_checkpoints: Count = 2
    """How many of the newest stay, beside the best weights by validation."""
    keep_every: Count | None = None
    """Checkpoints after a multiple of this many updates are written and stay for good."""


class GuardsConfig(_Section):
    """What ends a run that has gone wrong."""

    divergence: bool = True
    divergence_warn: Positive = 10.0
    divergence_halt: Positive = 100.0
    stuck_after: Count | None = 1000
    """After so many updates the raw loss must have fallen below stuck_ratio of where it began; null does not look."""
    stuck_ratio: Share = 0.98
    nonfinite_limit: Count = 20


class AdaptersConfig(_Section):
    """Low-rank adapters that teach a trained, frozen network images together with masks (`neuromf lora`)."""

    base: str | None = None
    """The run, or exported generator, that is adapted; null trains a network of its own."""
    rank: Count = 8
    lora_alpha: Positive = 16.0
    """The adapters' output is multiplied by lora_alpha / rank."""
    targets: Literal["attention", "attention+blocks"] = "attention"
    """What they stand beside: attention alone, or also convolutions (maisi-unet) or feed-forward layers (mit)."""
    mask: Literal["auto", "autoencoder", "downsample"] = "auto"
    """How a mask becomes latent channels: through the autoencoder, or as block means; auto measures which is better."""
    image_lp: Positive | None = None
    """objective.lp of the image's channels; null leaves it."""
    mask_lp: Positive | None = None
    """objective.lp of the mask's channels; null leaves it."""
    mask_weight: Positive | None = None
    """Weight of each of the mask's channels against an image's mean one; null has mask and image weigh alike."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """`targets` as a list."""
        return tuple(self.targets.split("+"))


class TrackingConfig(_Section):
    """Where a run's figures go beside its folder; they go nowhere unless a service is named."""

    to: tuple[Literal["wandb", "mlflow"], ...] = ()
    project: str = "neuromf"
    """The project (W&B) or experiment (MLflow) that the run belongs to."""
