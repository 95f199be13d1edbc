"""Six recipes: five published systems (one paper has two) as configurations of this method.

Every function returns a [`SensiConfig`] and passes further keyword arguments on to it (`calibration=`, `task_type=`,
...). A recipe whose training has phases sets `schedule`: give [`SensiCallback`] to `Trainer`, or step a [`Schedule`].
An argument with a wrong type or range is a `SensiError`, and so is one that the recipe sets to another value itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from .utils.checks import is_count, is_number, shown
from .utils.errors import SensiError


if TYPE_CHECKING:
    from .tuner.config import SensiConfig


LATE_CUT = {"phase": "cut", "start": 0.6, "end": 0.6, "cuts": 1}  # a schedule: one cut, after 60 % of the training
# In BERT and others, DistilBERT, most decoders, DeBERTa-v2 and v3, T5 and MPNet.
QUERY_AND_VALUE = ["query", "value", "q_lin", "v_lin", "q_proj", "v_proj", "query_proj", "value_proj", "q", "v"]


def sensi_bert(
    budget: float | int | str,
    limit: Literal["params", "flops", "latency"] = "params",
    score: str | None = None,
    granularity: Literal["unit", "tensor"] = "unit",
    trim: Literal["at wrap", "after warm-up", "in cuts", "late"] = "at wrap",
    **kwargs: Any,
) -> SensiConfig:
    """Sensi-BERT (arXiv 2307.11764): rank, trim to a budget of parameters, FLOPs or time, fine-tune the rest.

    The paper's abstract gives the procedure. Scoring and allocation follow the closest published methods: EarlyBERT's
    learned masks (arXiv 2101.00063) and the allocation of Kwon et al. (arXiv 2204.09656).

    Args:
        budget: A share in (0, 1] or a count of the prunable parameters or FLOPs; of a latency, a share or a time such
            as `"12ms"`.
        limit: What `budget` limits. For `"latency"`, give `latency=` a table; without one, this machine is measured.
        score: Default: `"mask"` at the wrap, and `"fisher"` during training, where masks would have to be learned
            beside the weights.
        granularity: `"tensor"` keeps or removes whole sublayers.
        trim: When the model is trimmed: `"after warm-up"` is after the first tenth of the training, `"in cuts"` is in
            four cuts until the middle of the training, and `"late"` is once, after 60 %, when the model has learned
            the task. Late is best for hard tasks.

    Raises:
        SensiError: If `trim` is none of these.
    """
    schedules = {
        "at wrap": None,
        "after warm-up": {"phase": "cut", "start": 0.1, "end": 0.1, "cuts": 1},
        "in cuts": {"phase": "cut", "start": 0.1, "end": 0.5, "cuts": 4},
        "late": dict(LATE_CUT),
    }
    if not isinstance(trim, str) or trim not in schedules:
        raise SensiError(f"`trim` must be one of {', '.join(schedules)}, got {shown(trim)}.")
    own: dict[str, Any] = {"budget": {limit: budget}, "granularity": granularity}
    if (when := schedules[trim]) is not None:
        own["schedule"] = when
    return _config("sensi_bert", own | {"score": score or ("mask" if when is None else "fisher")}, kwargs)


def far(
    retention: float = 0.1,
    priming: float = 0.01,
    training_steps: int | None = None,
    embeddings: bool = True,
    score: str = "movement",
    **kwargs: Any,
) -> SensiConfig:
    """FAR, Freeze And Reconfigure (arXiv 2205.01541): tune the FFN neurons that priming moves most, freeze the others.

    Everything outside the FFNs is trained too.

    Args:
        retention: Share of each FFN's neurons that are tuned.
        priming: Share of the training that the short fine-tuning before scoring takes, if `training_steps` is given.
        training_steps: Number of optimizer steps of the whole training.
        embeddings: Whether the embeddings are trained. In a small model they are half of the trained values.
        score: The score of the neurons. `"random"` is the paper's control.
    """
    if not is_number(retention):  # without one, units would be trimmed
        raise SensiError(f"`retention` must be a share of the neurons, got {shown(retention)}.")
    own: dict[str, Any] = {"retention": retention, "score": score}
    own["also_train"] = ["norms", "output_biases", "pooler", *(["embeddings"] if embeddings else [])]
    if training_steps is not None:
        if not (is_number(priming) and 0 < priming <= 1):
            raise SensiError(f"`priming` must be a share of the training in (0, 1], got {shown(priming)}.")
        if not is_count(training_steps):
            raise SensiError(f"`training_steps` must be a number of steps, got {shown(training_steps)}.")
        own["priming_steps"] = max(1, round(priming * training_steps))
    return _config("far", own, kwargs)


def learners(rank: int = 64, priming_epochs: float = 2, **kwargs: Any) -> SensiConfig:
    """Learners + priming (arXiv 2208.02070): train a low-rank term beside every Linear of the blocks.

    For the first `priming_epochs` epochs attention is trained too. It is then frozen at its trained values, and only
    the low-rank terms of rank `rank`, all biases and the norms are trained on. Everything can be merged.

    Give `calibration` batches where the labels are very uneven, such as tags of words: the head then starts at their
    frequencies. Otherwise the first phase may learn these and nothing else.

    Args:
        rank: Rank of the low-rank terms.
        priming_epochs: Number of epochs in which attention is trained too, which may be a fraction; 0 for none.
    """
    if not is_number(priming_epochs):
        raise SensiError(f"`priming_epochs` must be a number of epochs, got {shown(priming_epochs)}.")
    own: dict[str, Any] = {"rank": rank, "also_train": ["biases", "norms"]}
    if not priming_epochs:
        kwargs.setdefault("scale", 1.0)  # as in the update with priming, whose rate is that of its dense part
        return _config("learners", own | {"update": "low_rank"}, kwargs)
    # With retention 0 no neuron is tuned, so attention is the dense part.
    schedule = {"phase": "freeze_dense", "epochs": priming_epochs}
    return _config("learners", own | {"update": "dense+low_rank", "retention": 0.0, "schedule": schedule}, kwargs)


def dsee(
    rank: int = 16,
    sparse: int = 128,
    mask: Literal["unstructured", "structured"] | None = None,
    sparsity: float | None = None,
    support: str = "decomposition",
    draw_at: float = 0.5,
    **kwargs: Any,
) -> SensiConfig:
    """DSEE (arXiv 2111.00160): `(W + U V + S2) * S1`, with a low-rank `U V` and a sparse `S2` on query and value.

    Args:
        rank: Rank of `U V`.
        sparse: Number of trained values of `S2` in each matrix.
        mask: `"unstructured"` removes single weights of every Linear of the blocks. `"structured"` removes heads (by
            the size of `U V + S2`) and neurons (by the size of their weights). Default: nothing is removed.
        sparsity: Share of the weights, or of the FLOPs for a structured mask, that is removed.
        support: How the positions of `S2` are chosen, as in [`SensiConfig`].
        draw_at: Share of the training after which the weights or units are removed.
        **kwargs: `target_modules` are the names of query and value where these are one matrix (GPT-2, ModernBERT) or
            have other names than usual.

    Raises:
        SensiError: If only one of `mask` and `sparsity` is given, or if `mask` has another value.
    """
    if (mask is None) != (sparsity is None):
        raise SensiError("`mask` and `sparsity` belong together: give both or none.")
    if sparsity is not None and not (is_number(sparsity) and 0 <= sparsity < 1):
        raise SensiError(f"`sparsity` must be a share in [0, 1), got {shown(sparsity)}.")
    kwargs.setdefault("target_modules", QUERY_AND_VALUE)
    own: dict[str, Any] = {"update": "low_rank+sparse", "rank": rank, "sparse": sparse, "support": support}
    if mask == "unstructured":
        own |= {"sparsity": sparsity, "schedule": {"phase": "draw_mask", "at": draw_at}}
    elif mask == "structured":
        kwargs.setdefault("score", "movement")
        own["budget"] = {"flops": 1.0 - float(sparsity or 0.0)}
        own["schedule"] = {"phase": "cut", "start": draw_at, "end": draw_at, "cuts": 1}
    elif mask is not None:
        raise SensiError(f"`mask` must be 'unstructured', 'structured' or None, got {shown(mask)}.")
    return _config("dsee", own, kwargs)


def l0_close(
    share: float | None = None, layers: int | None = None, score: str = "movement", **kwargs: Any
) -> SensiConfig:
    """L0-close fine-tuning (arXiv 2004.14129): tune only the Linears, or the layers, that priming moves most.

    `model.explain()` shows which of them were chosen.

    Args:
        share: Limit on the parameters of the tuned Linears, as a share of the base's. Default: 0.25, if `layers` is
            not given.
        layers: Number of whole layers that are tuned.
        score: The score of the Linears.
    """
    if layers is None and share is None:
        share = 0.25
    budget = None if share is None else {"trainable": share}
    own = {"granularity": "tensor", "budget": budget, "tuned_layers": layers, "score": score}
    return _config("l0_close", own, kwargs)


def binary_mask(sparsity: float = 0.1, **kwargs: Any) -> SensiConfig:
    """Binary masks over frozen weights (arXiv 2004.14129): only the mask and the task head are trained.

    `model.compress("bits")` stores the mask as one bit for each weight.

    Args:
        sparsity: Share in [0, 1) of each matrix's weights that the mask removes.
    """
    return _config("binary_mask", {"granularity": "weight", "update": "mask", "sparsity": sparsity}, kwargs)


def _config(recipe: str, own: dict[str, Any], given: dict[str, Any]) -> SensiConfig:
    """The config with the recipe's own fields and those that the user has given. The latter replace none of them."""
    from .tuner.config import SensiConfig  # here, because the command lists the recipes without PEFT

    for name in own.keys() & given.keys():
        if given[name] != own[name]:
            raise SensiError(
                f"The recipe {recipe!r} sets `{name}` to {shown(own[name])}, and you give {shown(given[name])}: leave "
                f"it out, or write a `SensiConfig`."
            )
    return SensiConfig(**given | own)


RECIPES = {f.__name__: f for f in (sensi_bert, far, learners, dsee, l0_close, binary_mask)}
