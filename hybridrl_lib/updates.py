"""One optimiser update: the loss of a mini-batch, its gradient over micro-batches, one step."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from .config import Settings
from .distributed import merged, my_sequences, size, sum_gradients, together, wants_shards
from .errors import UserError
from .objectives import (
    entropy_terms,
    is_clipped,
    k3,
    kl_to_old,
    kl_to_reference,
    policy_token_losses,
    sft_token_losses,
)
from .packing import Packed, PromptCompletion, pack
from .policy import Policy
from .sharding import plain, shard, share_state, whole_state

PATIENCE_WITH_NON_FINITE = 5  # updates in a row with a non-finite gradient before a run stops
PATIENCE_WITH_SCALING = 20  # in fp16, where each one halves the loss scale, from 2^16 on


@dataclass
class Update:
    """What one optimiser update learns from: S completions and the weight of each one's tokens.

    Attributes:
        sequences: S demonstrations and rollouts.
        sft, rl, entropy: (S,) weight of every token of completion i in L_SFT, L_RL and H, with
            lambda and gamma multiplied in; 0 where a term does not apply.
        advantages: (S,).
        temperature: (S,) that the completion was sampled at; 1 for demonstrations.
        old: log pi_old of every token, a tensor (T_i,) a completion; None while the policy is
            still the one that sampled (then the ratio is 1).
        anchor: likewise the policy that the loss keeps the policy near, unless that is the old one.
        token_advantages: (T_i,) a completion, on top of its advantage; None for none.
        demonstration_loss: what the tokens of completion i cost in L_SFT, (T_i,) with gradient, of
            i, their log-probabilities (T_i,) and entropies (T_i,); None for -log pi.
        marked: (T_i,) bool a completion, the tokens that the entropy control treats apart; chosen
            once, so that they stay the same where BRIDGE takes the gradient at other weights.
        demonstrations: how many of the first sequences are demonstrations, for the record.
        lambda_sft, lambda_rl: for the record, which shows L_SFT and L_RL without them.
        optimizer: which of the run's optimisers takes the update; each has its own moments.
        learning_rate: its own, or None for that of the step.
        largest_norm: an update whose gradient has a larger norm, before clipping, is left out.
    """

    sequences: list[PromptCompletion]
    sft: Tensor
    rl: Tensor
    entropy: Tensor
    advantages: Tensor
    temperature: Tensor
    old: list[Tensor] | None = None
    anchor: list[Tensor] | None = None
    token_advantages: list[Tensor] | None = None
    demonstration_loss: Callable[[int, Tensor, Tensor], Tensor] | None = None
    marked: list[Tensor] | None = None
    demonstrations: int = 0
    lambda_sft: float = 1.0
    lambda_rl: float = 1.0
    optimizer: str = "main"
    learning_rate: float | None = None
    largest_norm: float = math.inf


@dataclass
class Totals:
    """Sums and counts over the tokens of a step, for its line in metrics.jsonl."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, values: Tensor, count: int | None = None) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.sum())
        self.counts[name] = self.counts.get(name, 0) + (
            values.numel() if count is None else count)

    def take_in(self, other: "Totals") -> None:
        """Adds another's sums and counts."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]

    def mean(self, name: str) -> float | None:
        return self.sums[name] / self.counts[name] if self.counts.get(name) else None


def make_accelerator(device: torch.device) -> Accelerator:
    """An `Accelerator` for a device, also after a run on another one in the same process.

    accelerate lets a process have one device; a notebook goes from one preset to the next.
    """
    known = AcceleratorState._shared_state
    if size() == 1 and not wants_shards() and known and known["device"].type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no")


class Learner:
    """Scores completions with the policy and moves its weights.

    Args:
        policy: the model being trained.
        settings: of the run.
    """

    def __init__(self, policy: Policy, settings: Settings):
        self.policy, self.settings = policy, settings
        self.accelerator = make_accelerator(policy.device)
        if policy.precision == "fp16":
            # accelerate's own is for GPUs only, and it allows one precision a process.
            self.accelerator.scaler = torch.amp.GradScaler(policy.device.type)
            # It has a scale from its first loss on, and a process may have no completion at first.
            self.accelerator.scaler.scale(torch.zeros((), device=policy.device))
        self.sharded = wants_shards()
        if self.sharded:
            for model in (policy.model, policy._frozen):
                if model is not None:
                    shard(model)
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.non_finite_in_a_row: Counter[str] = Counter()  # updates by optimiser
        self.loss_is_finite = True  # since the last step
        self.place = ""  # the step and its batch in words, which the trainer sets
        self.entropy_control = None  # an `EntropyControl`, which the trainer sets

    @property
    def optimizer(self):
        """The optimiser of all updates that name no other; None before a stage has begun."""
        return self.optimizers.get("main")

    def new_optimizer(self, name: str = "main") -> None:
        """A fresh AdamW: every stage starts with one, and without those of the stage before."""
        training = self.settings.training
        if name == "main":
            self.optimizers.clear()
        self.optimizers[name] = self.accelerator.prepare(torch.optim.AdamW(
            self.parameters, lr=0.0, betas=tuple(training.betas),
            weight_decay=training.weight_decay, fused=self.policy.precision != "fp16"))
        # accelerate would keep every optimiser that it has prepared, with its moments.
        self.accelerator._optimizers.clear()

    def optimizer_states(self) -> dict[str, dict]:
        """The state of every optimiser, by its name."""
        states = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {name: whole_state(s) for name, s in states.items()} if self.sharded else states

    def load_optimizer_states(self, states: dict[str, dict]) -> None:
        """The inverse of `optimizer_states`."""
        for name, state in states.items():  # "main", which clears the others, is the first
            self.new_optimizer(name)
            self.optimizers[name].load_state_dict(state)
            if self.sharded:
                share_state(self.optimizers[name].optimizer)

    @torch.no_grad()
    def scores(self, sequences: Sequence[PromptCompletion], model=None,
               temperature: float | None = None) -> list[Tensor]:
        """Log-probabilities (T_i,) of every completion under the policy or another model."""
        temperature = temperature or self.settings.rl.temperature
        mine, device = my_sequences(sequences), self.policy.device

        def score() -> dict[int, Tensor]:
            result = {}
            for packed, counts in self._passes(sequences, mine):
                scores, _ = self.policy.score(
                    packed.to(device), temperature=temperature, with_entropy=False,
                    chunk_tokens=self.settings.training.logit_chunk_tokens, model=model)
                owners, lengths = packed.sequence.unique_consecutive(return_counts=True)
                if counts:
                    result |= {mine[i]: piece if size() == 1 else piece.cpu() for i, piece in zip(
                        owners.tolist(), scores.split(lengths.tolist()), strict=True)}
            return result

        found = merged(together(score))
        return [found[i].to(device) for i in range(len(sequences))]

    def apply(self, update: Update, learning_rate: float, totals: Totals) -> float | None:
        """Accumulates the gradient over micro-batches and steps.

        Args:
            totals: sums for the record are added to it.

        Returns:
            The gradient's norm before clipping, or None where there was nothing to learn from. If
            it is not finite, the weights stayed as they are.

        Raises:
            UserError: the loss or its gradient was not finite several updates in a row.
        """
        if not self.accumulate(update, totals):
            return None
        norm = self.step(update.learning_rate or learning_rate, update.optimizer,
                         update.largest_norm)
        if update.largest_norm < norm < math.inf:
            totals.add("left_out", torch.ones(1))
        return norm

    def accumulate(self, update: Update, totals: Totals) -> bool:
        """Adds the gradient of an update's loss to the parameters'; False if there is none."""
        keep = self.has_gradient(update)
        if keep.any() and self.entropy_control is not None and update.marked is None:
            self.entropy_control.mark(update, self)
            if update.marked is not None:  # what KL-Cov has marked has a gradient
                keep = self.has_gradient(update)
        keep = keep.nonzero().squeeze(-1).tolist()
        self._count_skipped(update, keep, totals)
        if size() == 1 or not keep:
            self.loss_is_finite &= self._backward(update, keep, keep, totals)
            return bool(keep)
        mine = [keep[i] for i in my_sequences([update.sequences[i] for i in keep])]
        before, part = self._take_gradients(), Totals()
        finite = self._backward(update, keep, mine, part)
        if not self.sharded:  # whose gradients are summed layer by layer, in the backward pass
            sum_gradients(self.parameters)
        for gradient, parameter in zip(before, self.parameters, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad
        for other, theirs in together(lambda: (part, finite)):
            totals.take_in(other)
            self.loss_is_finite &= theirs
        return True

    def _backward(self, update: Update, keep: list[int], mine: list[int], totals: Totals) -> bool:
        """Adds the gradient of this process's completions, `mine` of the update's `keep`.

        Returns:
            Whether the loss was finite.
        """
        device, finite = self.policy.device.type, True
        with self.policy.autocast():  # around all micro-batches: weights are cast once for them
            for packed, counts in self._passes(update.sequences, mine, keep[:1]):
                loss = (self._loss(update, mine, packed, totals) if counts else self._loss(
                    replace(update, demonstration_loss=None), keep[:1], packed, Totals()))
                with torch.autocast(device, enabled=False):
                    self.accelerator.backward(loss if counts else 0 * loss)
                finite &= not counts or bool(loss.isfinite())
        return finite

    def _take_gradients(self) -> list[Tensor | None]:
        """The gradients of the parameters, which have none afterwards."""
        taken = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return taken

    def _passes(self, sequences: Sequence[PromptCompletion], mine: list[int],
                any_one: Sequence[int] = (0,)) -> Iterator[tuple[Packed, bool]]:
        """The micro-batches of the sequences at `mine`, and whether each counts.

        Under FSDP all processes make equally many passes: those with fewer add some over one
        sequence, `any_one`, that do not count.
        """
        batches = self._pack([sequences[i] for i in mine])
        missing = (max(together(lambda: len(batches))) - len(batches)) if self.sharded else 0
        yield from ((packed, True) for packed in batches)
        if missing:
            spare = self._pack([sequences[i] for i in any_one])[0]
            yield from ((spare, False) for _ in range(missing))

    def gradient_norm(self, update: Update) -> float:
        """Norm of the gradient of an update that is not taken, as `step` would return it."""
        if not self.accumulate(update, Totals()):
            return 0.0
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters
                                              if p.grad is not None])
        self._take_gradients()
        self.loss_is_finite, scaler = True, self.accelerator.scaler
        return float(plain(norm)) / (1.0 if scaler is None else scaler.get_scale())

    def step(self, learning_rate: float, optimizer: str = "main",
             largest_norm: float = math.inf) -> float:
        """Clips the gradient, moves the weights and clears it; returns its norm before clipping.

        A gradient with a norm above `largest_norm` is cleared alone. Where the loss was not finite
        the weights stay as they are, too, and the norm is not a number.

        Raises:
            UserError: the loss or its gradient was not finite several times in a row.
        """
        if optimizer not in self.optimizers:
            self.new_optimizer(optimizer)
        chosen = self.optimizers[optimizer]
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(chosen.optimizer)
        norm = float(plain(self.accelerator.clip_grad_norm_(
            self.parameters, self.settings.training.gradient_clip)))
        for group in chosen.param_groups:
            group["lr"] = learning_rate
        if not self.loss_is_finite:  # its gradient may be finite all the same
            norm = math.nan
        if norm > largest_norm or not self.loss_is_finite:
            chosen.zero_grad(set_to_none=True)  # AdamW leaves alone what has no gradient
        self.loss_is_finite, finite = True, math.isfinite(norm)
        if finite or scaler is not None:  # which skips by itself, and finds another scale
            chosen.step()
        chosen.zero_grad(set_to_none=True)
        in_a_row = 0 if finite else self.non_finite_in_a_row[optimizer] + 1
        self.non_finite_in_a_row[optimizer] = in_a_row
        fp16 = self.policy.precision == "fp16"
        if in_a_row >= (PATIENCE_WITH_SCALING if fp16 else PATIENCE_WITH_NON_FINITE):
            raise UserError(
                f"The loss or its gradient was not finite {in_a_row} updates in a row"
                + (f", the last at {self.place}" if self.place else "") + "; lower the "
                + ("learning rate" if self.policy.precision == "fp32" else
                   "learning rate or set model.precision=fp32") + ", then delete the run's folder.")
        return norm

    def has_gradient(self, update: Update) -> Tensor:
        """(S,) bool: the completions that can move the policy.

        A group of equal rewards has no policy gradient. While the policy is still the one that
        sampled, the KL to it has none either. Without an entropy term such a group is skipped.
        """
        signal = update.advantages != 0
        if update.token_advantages is not None:
            signal = signal | torch.tensor([bool((t != 0).any()) for t in update.token_advantages])
        if update.marked is not None and self.settings.entropy_control.kind == "kl_cov":
            signal = signal | torch.tensor([bool(marked.any()) for marked in update.marked])
        anchored = self.settings.rl.beta > 0 and (self.needs_anchor or update.old is not None)
        return (update.sft != 0) | (update.entropy != 0) | ((update.rl != 0) & (signal | anchored))

    @property
    def needs_anchor(self) -> bool:
        """Whether the loss holds the KL to another policy than the one that sampled."""
        return self.settings.rl.beta > 0 and self.settings.rl.kl_anchor != "old"

    def _pack(self, sequences: Sequence[PromptCompletion]) -> list[Packed]:
        return pack(sequences, self.settings.training.micro_batch_tokens, self.policy.pad_id)

    def _count_skipped(self, update: Update, keep: list[int], totals: Totals) -> None:
        """Skipped answers count as what they are: not clipped, and no KL while the ratio is 1.

        Once the policy has moved their KL is not 0 but unknown: the mean is over the others.
        """
        left_out = set((update.rl != 0).nonzero().squeeze(-1).tolist()) - set(keep)
        tokens = sum(len(update.sequences[i].completion) for i in left_out)
        if tokens:
            totals.add("loss/rl", torch.zeros(1))
            totals.add("clip_ratio", torch.zeros(1), tokens)
            if update.old is None:
                totals.add("kl/old", torch.zeros(1), tokens)

    def _loss(self, update: Update, keep: list[int], packed: Packed, totals: Totals) -> Tensor:
        """The part of L = lambda_SFT L_SFT + lambda_RL L_RL - gamma H in one micro-batch."""
        settings, device = self.settings, self.policy.device
        owners = torch.tensor(keep)[packed.sequence]  # (N,) index into update.sequences

        def per_token(values: Tensor) -> Tensor:
            return values[owners].to(device)

        def flat(values: list[Tensor]) -> Tensor:
            return in_order(values, owners, device)

        sft, rl, entropy = (per_token(w) for w in (update.sft, update.rl, update.entropy))
        # Without an entropy term it is needed only where no rollout gives it for the record.
        with_entropy = (bool((entropy != 0).any()) or not (update.rl != 0).any()
                        or update.demonstration_loss is not None)
        scores, entropies = self.policy.score(
            packed.to(device), temperature=per_token(update.temperature),
            chunk_tokens=settings.training.logit_chunk_tokens, with_entropy=with_entropy)
        if with_entropy:
            totals.add("entropy", entropies.detach())
        loss = scores.new_zeros(())

        if (sft != 0).any():
            part = (sft * self._demonstration_losses(update, owners, scores, entropies)).sum()
            totals.add("loss/sft", part.detach() / update.lambda_sft)
            loss = loss + part

        if (rl != 0).any():
            old = scores.detach() if update.old is None else flat(update.old)
            advantages = per_token(update.advantages)
            if update.token_advantages is not None:
                advantages = advantages + flat(update.token_advantages)
            bounds = ((settings.rl.epsilon_low, settings.rl.epsilon_high) if settings.rl.clip
                      else (math.inf, math.inf))
            arguments = (old, advantages, *bounds)
            losses = policy_token_losses(scores, *arguments)
            if update.marked is not None:
                losses = self.entropy_control.losses(losses, flat(update.marked), scores, old)
            if self.needs_anchor:
                anchor = flat(update.anchor)
                losses = losses + settings.rl.beta * (
                    k3(scores, anchor) if settings.rl.kl_estimator == "k3"
                    else kl_to_reference(scores, old, anchor))
            elif settings.rl.beta > 0:
                losses = losses + settings.rl.beta * kl_to_old(scores, old)
            part = (rl * losses).sum()
            sampled = rl != 0
            totals.add("loss/rl", part.detach() / update.lambda_rl)
            totals.add("kl/old", kl_to_old(scores.detach(), old)[sampled])
            totals.add("clip_ratio", is_clipped(scores.detach(), *arguments)[sampled].float())
            loss = loss + part

        if (entropy != 0).any():
            terms = entropy_terms(scores, entropies, settings.training.entropy)
            loss = loss - (entropy * terms).sum()
        return loss

    @staticmethod
    def _demonstration_losses(update: Update, owners: Tensor, scores: Tensor,
                              entropies: Tensor) -> Tensor:
        """(N,) what every token costs in L_SFT; those of rollouts without a weight in it, 0."""
        if update.demonstration_loss is None:
            return sft_token_losses(scores)
        indices, lengths = owners.unique_consecutive(return_counts=True)
        return torch.cat([
            update.demonstration_loss(i, piece, entropy) if update.sft[i] != 0
            else torch.zeros_like(piece)
            for i, piece, entropy in zip(indices.tolist(), scores.split(lengths.tolist()),
                                         entropies.split(lengths.tolist()), strict=True)])


def in_order(values: Sequence[Tensor], owners: Tensor, device: torch.device | str) -> Tensor:
    """(N,) the values of the completions that packed tokens belong to, on the device.

    Args:
        values: (T_i,) of every completion, on any device.
        owners: (N,) the completion of each token; the tokens of one are contiguous.
    """
    return torch.cat([values[i].to(device) for i in owners.unique_consecutive().tolist()])
