"""Every option of every stage: small frozen dataclasses, one docstring per field.

An input left at None means "what the stage before it in the recipe left"; called alone, a stage
needs it given. `resolve` in `suasion.config.recipe` fills these in, once, before anything runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NaturalFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
TooLong = Literal["error", "drop", "cut"]


def _listed(value: object) -> object:
    """Let a single name stand for a list of one."""
    return (value,) if isinstance(value, str) else value


def _plain_options(given: object) -> object:
    """Read texts, which is what a command line gives, as the numbers and truths they stand for."""
    if not isinstance(given, dict):
        return given
    nested = [name for name, value in given.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{nested[0]} must be a number, a text, a truth, null or a list")
    return {name: _read(value) for name, value in given.items()}


def _read(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_read(inner) for inner in value)
    if not isinstance(value, str):
        return value
    for kind in (int, float):  # not by YAML, which takes 1e-5 for a text
        try:
            number = kind(value)
        except ValueError:
            continue
        return number if math.isfinite(number) else value
    return {"true": True, "false": False, "null": None}.get(value, value)


PlainOptions = Annotated[
    dict[str, bool | int | float | str | tuple[float | str, ...] | None],
    BeforeValidator(_plain_options),
]
"""Keyword arguments: numbers, texts, truths, null, or lists of these."""

Trackers = Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_listed)]

QUESTION_ANSWER = "Question: {query}\n\nAnswer: {response}"


class Strict:
    """Base of every configuration class: unknown keys are errors."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Strict):
    """Low-rank adapters on the linear layers (arXiv 2106.09685)."""

    r: Natural = 0
    """Rank; 0 means no adapter: all weights train."""
    alpha: PositiveFloat = 32.0
    """Scale: the update is multiplied by alpha / r."""
    dropout: Fraction = 0.05
    """Dropout in front of the adapter; always off in the policy stage."""
    targets: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Names of the modules to adapt; empty means every linear layer except the output head."""
    base: Literal["fp32", "bf16", "int8", "nf4"] = "fp32"
    """How the frozen base under the adapter is held: in 4, 2, 1 or about 0.6 bytes per weight. All
    but fp32 change the model a little; int8 and nf4 need the extra `quant`."""
    checkpointing: bool = False
    """Keep only what goes into each layer and compute the rest again in the backward pass: a third
    more time for a fraction of the activations' memory."""
    merge: bool = True
    """Merge the adapter into the base as it was held when training ends; the adapter is kept
    beside it."""
    merge_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the merged weights; the sum itself is taken in fp32."""


@dataclass(frozen=True, kw_only=True)
class FreshModelConfig(Strict):
    """A model and tokenizer made from nothing."""

    family: Literal["gpt2", "llama"] = "llama"
    """Architecture."""
    vocabulary: Annotated[int, Field(ge=260)] = 1024
    """Size of the byte-level BPE vocabulary trained on the text, special tokens included."""
    context: Positive = 256
    """Longest sequence, in tokens."""
    hidden_size: Positive = 128
    """Width."""
    layers: Positive = 4
    """Depth."""
    heads: Positive = 4
    """Attention heads."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Strict):
    """What every stage on the transformers Trainer shares."""

    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Fraction = 0.05
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: NaturalFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    batch_size: Positive = 16
    """Sequences (or pairs) per forward and backward pass."""
    accumulate: Positive = 1
    """Passes per optimizer step."""
    epochs: PositiveFloat = 1.0
    """Times over the data; `max_steps` wins where it is set."""
    max_steps: Positive | None = None
    """Optimizer steps in all."""
    log_every: Positive = 10
    """Steps between two lines of metrics.jsonl."""
    save_every: Positive = 100
    """Steps between two checkpoints to resume from."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of forward and backward; `auto` is bf16 on a GPU that has it, else fp32."""
    track: Trackers = ("tensorboard",)
    """Experiment trackers, beside metrics.jsonl which is always written."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Strict):
    """From a Stack Exchange dump to questions, answers and pairs, split by question."""

    dump: str
    """Folder with Posts.xml and, where there is one, Users.xml."""
    site: str | None = None
    """Host name kept with every row, such as beer.stackexchange.com; default: from the folder."""
    max_pairs: Positive = 10
    """Most answer pairs kept per question."""
    supervised: Fraction = 0.3
    """Share of the questions for supervised fine-tuning."""
    reward: Fraction = 0.3
    """Share for the reward model."""
    policy: Fraction = 0.3
    """Share for the policy's prompts."""
    evaluation: Fraction = 0.1
    """Share held out from every stage."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Causal language modelling on raw text in blocks."""

    text: str | None = None
    """A .txt file, a folder of them, or a prepared folder (its supervised part)."""
    model: str | None = None
    """Folder or Hub name of the model to start from; None: a fresh one from `fresh`."""
    fresh: FreshModelConfig = field(default_factory=FreshModelConfig)
    """Shape of the fresh model; not used when `model` is given."""
    template: str = QUESTION_ANSWER
    """How a question and an answer become text, where `text` is a prepared folder."""
    block: Positive = 256
    """Tokens per training sequence; what does not fill the last block is dropped."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the text kept for perplexity; never trained on."""


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingConfig):
    """Supervised fine-tuning on packed question-answer texts."""

    model: str | None = None
    """Folder or Hub name of the model to start from."""
    data: str | None = None
    """Prepared folder, or a .jsonl/.parquet/.csv table with `query` and `response`."""
    template: str = QUESTION_ANSWER
    """How a query and a response become text; must name {query} and then {response}."""
    answers: Literal["best", "all"] = "best"
    """Of each question the best-scored answer, or every answer."""
    block: Positive = 256
    """Tokens per packed sequence."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train adapters instead of all weights, where its rank is above 0."""
    evaluation_rows: Positive = 256
    """Most held-out texts for perplexity."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainingConfig):
    """Reward model: pairwise loss on a sequence-classification head."""

    model: str | None = None
    """Folder or Hub name of the model to start from."""
    data: str | None = None
    """Prepared folder, or a .jsonl/.parquet/.csv table with `query`, `chosen`, `rejected`."""
    template: str = QUESTION_ANSWER
    """How a query and a response become text."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train adapters instead of all weights, where its rank is above 0."""
    max_length: Positive | None = None
    """Longest text in tokens; default: the model's context."""
    too_long: TooLong = "drop"
    """A pair over `max_length`: stop, leave it out, or cut its query."""
    center: NaturalFloat = 0.0
    """Weight of (r_chosen + r_rejected)^2, which keeps scores around zero (arXiv 2312.09244)."""
    evaluation_pairs: Positive = 2048
    """Most held-out pairs to evaluate on."""


@dataclass(frozen=True, kw_only=True)
class KlConfig(Strict):
    """The penalty for leaving the reference."""

    coef: NaturalFloat = 0.2
    """Initial coefficient beta; the reward of a token is -beta * log(policy / reference)."""
    adaptive: bool = True
    """Move beta so that the KL settles at `target` (arXiv 1909.08593, section 2.2)."""
    target: PositiveFloat = 6.0
    """Target KL, in nats per response."""
    horizon: PositiveFloat = 10000.0
    """Responses over which beta may change by the controller's full gain."""
    stop: PositiveFloat | None = None
    """Stop an iteration's updates when the policy moved this far (mean log-ratio, in nats)."""
    estimator: Literal["k1", "abs", "k2", "k3"] = "k1"
    """What beta weighs in the reward. Only k1, log(policy / reference), leads to the optimum of
    score - beta * KL; the others never pay a token for having become rarer, so that a policy
    trained long enough collapses to one answer. They are there to repeat older runs."""
    in_loss: Literal["k2", "k3"] | None = None
    """Set: the penalty is a term of the loss and not of the reward. k2, d^2 / 2, has the KL's
    gradient token by token and is blind to what a token does to later ones; k3 (GRPO's) follows
    the gradient of KL(reference || policy) and ends elsewhere. k1 there would do nothing."""


@dataclass(frozen=True, kw_only=True)
class ResponseConfig(Strict):
    """How responses are sampled."""

    max_tokens: Positive = 64
    """Longest response; the length sampler draws up to this."""
    min_sampled: Positive | None = None
    """Set: each response's limit is drawn uniformly from [min_sampled, max_tokens]."""
    temperature: PositiveFloat = 1.0
    """Logits are divided by it, in sampling and in every log-probability."""
    top_k: Natural = 0
    """Keep the k likeliest tokens; 0 keeps all. Anything else makes the KL estimate biased."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the likeliest tokens up to this mass. Below 1 the KL estimate is biased."""
    min_tokens: Natural = 0
    """No response ends before it has this many. Above 0 the KL estimate is biased."""
    stop_strings: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """A response also ends with the token that completes one of these."""
    at_once: Positive = 256
    """Responses sampled at the same time; each that ends makes room for the next prompt."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Strict):
    """From the reward's number to the score the policy is trained on."""

    baseline: Finite = 0.0
    """Subtracted from every score."""
    scale: bool = False
    """Divide by the running standard deviation of the scores."""
    clip: PositiveFloat | None = None
    """Clip to [-clip, clip], after baseline and scale."""
    no_eos: Literal["keep", "replace", "subtract"] = "keep"
    """A response that never ended: its score as it is, or `no_eos_value` instead, or less that."""
    no_eos_value: Finite = -1.0
    """The score it gets (replace), or the penalty whose magnitude is subtracted."""
    overlong: Positive | None = None
    """Set: scores fall over the last so many tokens before `response.max_tokens`, linearly
    (arXiv 2503.14476, eq. 13)."""
    overlong_penalty: PositiveFloat = 1.0
    """By how much they have fallen at `response.max_tokens`, in score units."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig(Strict):
    """Who estimates the returns."""

    kind: Literal["value_head", "reward_model", "policy_copy"] = "value_head"
    """A scalar head on the policy's trunk, or a separate model from the reward model's weights,
    or a separate model from the policy's. With `ppo.shared_base` a separate model is an adapter."""
    learning_rate: PositiveFloat | None = None
    """Its own learning rate; default: the policy's."""
    clip: PositiveFloat | None = 0.2
    """Values may move this far from the rollout's before the loss is clipped; None: no clipping."""
    coef: PositiveFloat = 0.1
    """Weight of the value loss beside the policy loss."""
    warmup: Natural = 0
    """First iterations in which only the critic learns."""
    lam: Fraction | None = None
    """GAE's lambda in the critic's targets (1: the return itself, arXiv 2503.01491); default: that
    of the advantages."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(Strict):
    """What the policy is held to."""

    kind: Literal["start", "layers", "model", "none"] = "start"
    """The policy as it starts (adapters off, a frozen snapshot of an adapter it goes on with, or a
    frozen copy); the same with its first `layers` shared and frozen; another `model`; or none:
    no penalty, and a KL of 0 in every figure."""
    layers: Positive | None = None
    """Layers that `kind: layers` shares, and freezes in the policy."""
    model: str | None = None
    """Folder or Hub name for `kind: model`."""
    base: Literal["fp32", "bf16", "int8", "nf4"] = "fp32"
    """How a frozen copy's linear layers are held; see `lora.base`."""
    offload: bool = False
    """Keep a frozen copy in the processor's memory, and on the GPU only while it is asked."""


@dataclass(frozen=True, kw_only=True)
class PpoConfig(Strict):
    """Proximal policy optimisation against a reward (arXiv 1707.06347, 1909.08593)."""

    model: str | None = None
    """Folder or Hub name of the policy to start from; an adapter's folder goes on with it."""
    data: str | None = None
    """Prepared folder (its policy queries), or a .jsonl/.parquet/.csv table with `query`."""
    reward: str | None = None
    """Reward-model folder; or `package.module:function`; or `pipeline:FOLDER#LABEL`."""
    shared_base: bool = False
    """Hold one set of base weights: `reward` is then an adapter's folder, and reward model and
    critic are adapters with heads of their own beside the policy's (`lora.r` above 0)."""
    template: str = QUESTION_ANSWER
    """How a query and a response become text."""
    steps: Positive = 50
    """Iterations of rollout, score, optimise."""
    batch_size: Positive = 64
    """Responses per iteration."""
    mini_batch_size: Positive = 16
    """Responses per optimizer step."""
    micro_batch_tokens: Positive = 4096
    """Most tokens, padding included, in one forward and backward pass; no effect on the result."""
    epochs: Positive = 4
    """Times each iteration's responses are trained on."""
    learning_rate: PositiveFloat = 1.41e-5
    """Peak learning rate."""
    schedule: str = "constant"
    """How the learning rate moves over the iterations: constant, linear or cosine (to zero), or
    the import path of a schedule's class, `torch.optim.lr_scheduler:ExponentialLR`."""
    schedule_options: PlainOptions = field(default_factory=dict)
    """Keyword arguments of the schedule; constant, linear and cosine take `warmup` (iterations),
    the last two also `floor` (a share of the learning rate)."""
    optimizer: str = "torch.optim:AdamW"
    """Import path of the optimizer's class."""
    optimizer_options: PlainOptions = field(default_factory=dict)
    """Keyword arguments of the optimizer beside the learning rate."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    clip: PositiveFloat = 0.2
    """The probability ratio's clip range."""
    clip_high: PositiveFloat | None = None
    """How far the ratio may rise above 1; default: `clip`, which then bounds both ways. Larger, it
    lets rare tokens gain more (clip-higher, arXiv 2503.14476, eq. 10)."""
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Bound the loss of tokens with a negative advantage at this many times the advantage
    (arXiv 1912.09729 has 3): such a token then has no gradient once its ratio is above that."""
    gamma: Fraction = 1.0
    """Discount."""
    lam: Fraction = 0.95
    """GAE's lambda (arXiv 1506.02438)."""
    entropy: NaturalFloat = 0.0
    """Weight of the entropy bonus."""
    whiten: Literal["batch", "mini_batch", "none"] = "batch"
    """Where advantages are whitened."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """What the policy is held to."""
    kl: KlConfig = field(default_factory=KlConfig)
    """The penalty for leaving the reference."""
    response: ResponseConfig = field(default_factory=ResponseConfig)
    """How responses are sampled."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """From the reward's number to the score."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """Who estimates the returns."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Rank above 0: train adapters; of an adapter that is gone on with, its own rank."""
    prompt_tokens: Positive | None = None
    """Longest prompt; default: what the context leaves beside the longest response."""
    too_long: TooLong = "error"
    """A prompt over the limit: stop, leave it out, or cut its query."""
    checks: Literal["stop", "report", "off"] = "stop"
    """Checks before the first step: a fault stops the run, or is only told; or no checks."""
    samples: Natural = 8
    """Fixed prompts whose responses are recorded as training goes."""
    sample_every: Positive = 10
    """Iterations between two such recordings."""
    save_every: Positive = 10
    """Iterations between two checkpoints to resume from."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of forward and backward; `auto` is bf16 on a GPU that has it, else fp32."""
    track: Trackers = ("tensorboard",)
    """Experiment trackers, beside metrics.jsonl which is always written."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Strict):
    """Merge an adapter into its base and prove that nothing changed."""

    model: str | None = None
    """Folder of the adapter."""
    data: str | None = None
    """Prepared folder or table whose texts the two are compared on."""
    template: str = QUESTION_ANSWER
    """How a query and a response become text."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the merged weights."""
    tolerance: PositiveFloat | None = None
    """Largest difference of a logit before the merge is refused; default: 1e-3 in fp32, and in 16
    bits, which round the weights, a tenth of the largest difference that the adapter makes."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Strict):
    """Perplexity, reward-model accuracy, and two models side by side on held-out prompts."""

    before: str | None = None
    """Model A: usually the supervised one; it is also the reference of the KL."""
    after: str | None = None
    """Model B: usually the policy."""
    start: str | None = None
    """Model the run began with, for the perplexity before."""
    perplexity_of: str | None = None
    """Model whose perplexity is the one after; default in a recipe: the supervised model."""
    reward: str | None = None
    """The reward the policy was trained on: folder, import path, or pipeline."""
    gold: str | None = None
    """A function that knows the truth, `package.module:function`; decides the win rate."""
    data: str | None = None
    """Prepared folder, or a table with `query`."""
    template: str = QUESTION_ANSWER
    """How a query and a response become text."""
    prompts: Positive = 200
    """Most held-out prompts to answer."""
    response: ResponseConfig = field(default_factory=ResponseConfig)
    """How responses are sampled, the same for both models."""
    too_long: TooLong = "drop"
    """A prompt or pair over the context: stop, leave it out, or cut its query."""
    evaluation_pairs: Positive = 2048
    """Most held-out pairs for the reward model's accuracy."""
    evaluation_rows: Positive = 256
    """Most held-out texts for perplexity."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence level of the intervals."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Strict):
    """One self-contained page about the run."""

    title: str | None = None
    """Heading; default: the recipe's name."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Strict):
    """The stages of a run, in order; a stage that is null is not run."""

    name: str
    """What the run is called."""
    out: str
    """Folder of the run; one folder per stage below it."""
    seed: Natural = 1
    """Every generator is derived from it by name."""
    threads: Positive | None = None
    """Processor threads; default: one per core."""
    template: str | None = None
    """How a query and a response become text, for every stage at once."""
    prepare: PrepareConfig | None = None
    """From votes to pairs."""
    pretrain: PretrainConfig | None = None
    """Raw text."""
    sft: SftConfig | None = None
    """Questions and answers."""
    reward: RewardConfig | None = None
    """Preferences."""
    ppo: PpoConfig | None = None
    """The policy."""
    merge: MergeConfig | None = None
    """Adapter into base."""
    evaluate: EvaluateConfig | None = None
    """What came out."""
    report: ReportConfig | None = None
    """The page."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Strict):
    """What a recipe is planned for."""

    card: str | None = None
    """Memory to fit into: 24GB, 24GiB, or a card's name; default: this machine's."""
    flops: PositiveFloat | None = None
    """Operations per second to reckon times with; default: the card's, or measured here."""
    json: str | None = None
    """Write the plan here too."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Strict):
    """The embedded default."""

    out: str = "runs/demo"
    """Folder of the run."""
    seed: Natural = 1
    """Of the world and of every stage."""
    questions: Positive = 6000
    """Questions in the world."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Strict):
    """Answers of a model."""

    model: str | None = None
    """Folder or Hub name."""
    prompt: str | None = None
    """One query."""
    data: str | None = None
    """A .jsonl/.parquet/.csv table with `query`, or a prepared folder (its evaluation queries)."""
    out: str | None = None
    """Write JSON lines with query and response here; default: print."""
    template: str = QUESTION_ANSWER
    """How a query and a response become text."""
    response: ResponseConfig = field(default_factory=ResponseConfig)
    """How responses are sampled."""
    greedy: bool = False
    """Take the likeliest token each time."""
    too_long: TooLong = "error"
    """A prompt over the context: stop, leave it out, or cut it."""
    limit: Positive | None = None
    """Most prompts."""
    seed: Natural = 1
    """Of the sampling."""
