"""Six recipes: five published systems (one paper has two) as configurations of this method.

Every function returns a [`SensiConfig`] and passes further keyword arguments on to it (`calibration=`, `task_type=`,
...). A recipe whose training has phases sets `schedule`: give [`SensiCallback`] to `Trainer`, or step a [`Schedule`].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from .utils.errors import SensiError


if TYPE_CHECKING:
    from .tuner.config import SensiConfig


LATE_CUT = {"phase": "cut", "start": 0.6, "end": 0.6, "cuts": 1}  # a schedule: one cut, after 60 % of the training
QUERY_AND_VALUE = ["query", "value", "q_lin", "v_lin", "q_proj", "v_proj"]


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
    if trim not in schedules:
        raise SensiError(f"`trim` must be one of {', '.join(schedules)}, got {trim!r}.")
    if (when := schedules[trim]) is not None:
        kwargs["schedule"] = when
    score = score or ("mask" if when is None else "fisher")
    return _config(budget={limit: budget}, score=score, granularity=granularity, **kwargs)


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
    if training_steps is not None:
        kwargs["priming_steps"] = max(1, round(priming * training_steps))
    also_train = ["norms", "output_biases", "pooler", *(["embeddings"] if embeddings else [])]
    return _config(retention=retention, score=score, also_train=also_train, **kwargs)


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
    also_train = ["biases", "norms"]
    if not priming_epochs:
        kwargs.setdefault("scale", 1.0)  # as in the update with priming, whose rate is that of its dense part
        return _config(update="low_rank", rank=rank, also_train=also_train, **kwargs)
    # With retention 0 no neuron is tuned, so attention is the dense part.
    schedule = {"phase": "freeze_dense", "epochs": priming_epochs}
    return _config(
        update="dense+low_rank", rank=rank, retention=0.0, also_train=also_train, schedule=schedule, **kwargs
    )


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

    Raises:
        SensiError: If only one of `mask` and `sparsity` is given, or if `mask` has another value.
    """
    if (mask is None) != (sparsity is None):
        raise SensiError("`mask` and `sparsity` belong together: give both or none.")
    kwargs.setdefault("target_modules", QUERY_AND_VALUE)
    if mask == "unstructured":
        kwargs |= {"sparsity": sparsity, "schedule": {"phase": "draw_mask", "at": draw_at}}
    elif mask == "structured":
        kwargs |= {
            "budget": {"flops": 1.0 - float(sparsity or 0.0)},
            "score": kwargs.get("score", "movement"),
            "schedule": {"phase": "cut", "start": draw_at, "end": draw_at, "cuts": 1},
        }
    elif mask is not None:
        raise SensiError(f"`mask` must be 'unstructured', 'structured' or None, got {mask!r}.")
    return _config(update="low_rank+sparse", rank=rank, sparse=sparse, support=support, **kwargs)


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
    return _config(granularity="tensor", budget=budget, tuned_layers=layers, score=score, **kwargs)


def binary_mask(sparsity: float = 0.1, **kwargs: Any) -> SensiConfig:
    """Binary masks over frozen weights (arXiv 2004.14129): only the mask and the task head are trained.

    `model.compress("bits")` stores the mask as one bit for each weight.

    Args:
        sparsity: Share in [0, 1) of each matrix's weights that the mask removes.
    """
    return _config(granularity="weight", update="mask", sparsity=sparsity, **kwargs)


def _config(**kwargs: Any) -> SensiConfig:
    from .tuner.config import SensiConfig  # here, because the command lists the recipes without PEFT

    return SensiConfig(**kwargs)


RECIPES = {f.__name__: f for f in (sensi_bert, far, learners, dsee, l0_close, binary_mask)}
