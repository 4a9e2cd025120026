"""A run as described by gin files: model, surgery, data and training step (`ModelRun`), and all of a training run (`Run`)."""

import dataclasses
from collections.abc import Iterator, Sequence

from upcycle import metric_writers, warning
from upcycle.data import DataSource
from upcycle.errors import UserError, refuse
from upcycle.evaluate.diversity import Diversity
from upcycle.evaluate.few_shot import FewShot
from upcycle.evaluate.protocol import Evaluator
from upcycle.evaluate.tasks import TaskMetrics
from upcycle.evaluate.validation import Validation
from upcycle.models import Model
from upcycle.schema import Count, Natural, Positive, Whole
from upcycle.surgery.operators import Start
from upcycle.surgery.plan import Surgery
from upcycle.training.health import Limits
from upcycle.training.optimizer import Optimizer
from upcycle.training.schedule import LearningRate, Policy
from upcycle.training.trainable import Trainable


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRun:
    """The part of a run that `upcycle eval`, `convert` and `compile` need.

    Attributes:
      model: the model to train [MODEL].
      optimizer: computes updates from gradients [OPTIMIZER].
      learning_rate: its schedule covers all steps, including those of the dense run.
      train_data: training data [TRAIN_DATASET]; None: no training, as in a conversion.
      eval_data: evaluation data [EVAL_DATASET]; None: no evaluation.
      total_steps: see `Run`; None: not set.
      initial_checkpoint_path: the checkpoint to start from, such as that of the dense model; None: from scratch; several for
        EXPERT_OPERATOR = 'branches' [INITIAL_CHECKPOINT_PATH].
      surgery: the surgery on the initial checkpoint [SURGERY].
      dense_step: step that the run starts at; None: the checkpoint's, which `.npz` files and Hugging Face folders
        lack [DENSE_STEP].
      few_shot: linear probes of a classifier's features [FEW_SHOT]; None: no probes.
      task_metrics: predictions and scores of a language model on seqio tasks [TASK_METRICS]; None: no tasks.
      num_microbatches: number of parts of a batch, processed one after the other; the gradient stays the same except for random
        draws, such as those of MIXUP [NUM_MICROBATCHES].
      mesh_shape: (data, expert, model) or 'auto' [MESH_SHAPE].
      trainable: which parameters are trained.
      parameters_over_data: also split parameters and optimizer state over the data axis (FSDP) [PARAMETERS_OVER_DATA].
      leaf_gradient_norms: log the norm of every leaf of the gradient [LEAF_GRADIENT_NORMS].
      seed: seed of initialisation and dropout [RANDOM_SEED].
    """

    model: Model
    optimizer: Optimizer
    learning_rate: LearningRate
    train_data: DataSource | None
    eval_data: DataSource | None = None
    total_steps: Count | None = None
    initial_checkpoint_path: str | Sequence[str] | None = None
    surgery: Surgery | None = None
    dense_step: Whole | None = None
    few_shot: FewShot | None = None
    task_metrics: TaskMetrics | None = None
    num_microbatches: Count = 1
    mesh_shape: str | Sequence[Count] = 'auto'
    trainable: Trainable = Trainable()
    parameters_over_data: bool = False
    leaf_gradient_norms: bool = False
    seed: Whole = 0

    def __post_init__(self):
        refuse(self._invalid())
        for data in filter(None, (self.train_data, self.eval_data)):
            self.model.check_data(data)
        for evaluator in self.evaluators:
            evaluator.check(self.model, self.eval_data)

    def _invalid(self) -> Iterator[str]:
        """Yields a sentence for each mistake."""
        if not self.model.moe_layers() and self.model != self.model.dense():
            yield (
                'the bindings that end in MOE_LAYERS choose no layers, so that the model would be dense: choose some, such as '
                f'(0,), or remove moe/{self.model.family}.gin.'
            )

    @property
    def evaluators(self) -> tuple[Evaluator, ...]:
        """The evaluators of a checkpoint, in this order."""
        validation = None if self.eval_data is None else Validation()
        return tuple(filter(None, (validation, self.few_shot, self.task_metrics)))

    @property
    def num_experts(self) -> int | None:
        """E, or None for a dense model; the same for all layers, which share the expert axis of the mesh."""
        experts = {moe.num_experts for moe in self.model.moe_layers().values()}
        if len(experts) > 1:
            raise UserError(
                f'NUM_EXPERTS must be the same in all stacks, which share one expert axis, not {sorted(experts)}.'
            )
        return next(iter(experts), None)


def without_gradient(model: Model) -> list[str]:
    """Returns the paths of the MoE layers whose router the loss of the task does not train."""
    return [path for path, moe in model.moe_layers().items() if moe.weights_are_constant]


def warn_without_gradient(model: Model) -> None:
    """Warns of such routers, where they are not refused: the model computes."""
    if paths := without_gradient(model):
        more = f' and {len(paths) - 1} more' if len(paths) > 1 else ''
        warning.once(
            f'tokens take one expert with weight 1 (NUM_SELECTED_EXPERTS = 1, NORMALIZE_COMBINE_WEIGHTS) in {paths[0]}{more}: '
            'the model computes, but the loss of the task does not train these routers.'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(ModelRun):
    """A training run: pretraining, dense continuation, upcycling, MoE from scratch or fine-tuning, all by bindings.

    Top-1 with weights that sum to 1 computes, but the loss of the task does not train its router. A run that makes such routers,
    from scratch or from a dense checkpoint, is refused. If its checkpoint has them, `preflight` warns.

    Attributes:
      model_dir: the folder that the run writes to [MODEL_DIR].
      total_steps: the step to stop at, counted from the dense run's first one, as in T5X [TRAIN_STEPS].
      dense_flops: cost of the initial checkpoint in FLOPs, if the checkpoint does not hold it [DENSE_FLOPS].
      step_0_factors: capacity factors at which an upcycled model is evaluated before training, for its receipt; see
        `evaluate.step_zero` [STEP_0_CAPACITY_FACTORS].
      diversity_period: steps between evaluations of how different the experts are [DIVERSITY_PERIOD]; None: no evaluations.
      eval_period: steps between evaluations [EVAL_PERIOD].
      checkpoint_period: steps between checkpoints [CHECKPOINT_PERIOD].
      checkpoint_keep: newest checkpoints to keep; None: all [CHECKPOINT_KEEP].
      log_period: steps between lines of the log [LOG_PERIOD].
      metric_writers: what gets these lines besides `metrics.jsonl`: 'tensorboard', 'wandb' (Weights & Biases)
        [METRIC_WRITERS].
      limits: when the run stops or rolls back.
    """

    model_dir: str
    total_steps: Count = dataclasses.field()  # without a default
    dense_flops: Natural | None = None
    step_0_factors: Sequence[Positive] = ()
    diversity_period: Count | None = None
    eval_period: Count = 1000
    checkpoint_period: Count = 1000
    checkpoint_keep: Count | None = 1
    log_period: Count = 100
    metric_writers: Sequence[str] = metric_writers.TENSORBOARD
    limits: Limits = Limits()

    def _invalid(self) -> Iterator[str]:
        yield from super()._invalid()
        if not self.model_dir:
            yield f'MODEL_DIR = {self.model_dir!r} must be the path of a folder.'
        yield from metric_writers.unknown(self.metric_writers)
        if self.surgery is not None and self.initial_checkpoint_path is None:
            yield 'INITIAL_CHECKPOINT_PATH is not set: this run starts from a checkpoint, so set it.'
        operator = None if self.surgery is None else self.surgery.operator
        makes_routers = self.surgery is None or (operator is not None and operator.starts_from is not Start.MOE)
        if makes_routers and without_gradient(self.model):
            yield (
                'NORMALIZE_COMBINE_WEIGHTS with NUM_SELECTED_EXPERTS = 1 makes every weight 1, so the router gets no gradient: '
                'turn it off, or select at least 2 experts.'
            )
        if self.learning_rate.policy is not Policy.CONTINUE and self.initial_checkpoint_path is None:
            yield (
                f"LEARNING_RATE_POLICY = '{self.learning_rate.policy}' needs a dense run, and this run starts from scratch: "
                'remove it, or set INITIAL_CHECKPOINT_PATH.'
            )

    @property
    def evaluators(self) -> tuple[Evaluator, ...]:
        """The evaluators of a training run, in this order."""
        validation = None if self.eval_data is None else Validation(self.eval_period)
        diversity = None if self.diversity_period is None else Diversity(self.diversity_period)
        return tuple(filter(None, (validation, self.few_shot, self.task_metrics, diversity)))
