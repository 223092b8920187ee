"""One optimizer update: the loss of a mini-batch, its gradient over micro-batches, one step."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from ..config.settings import Settings
from ..objectives import (
    entropy_term,
    grpo_loss,
    hybrid_loss,
    is_clipped,
    k3,
    kl_to_old,
    kl_to_reference,
    sft_loss,
)
from ..policy.packing import Packed, PromptCompletion, pack
from ..policy.policy import Policy
from ..system.errors import UserError
from ..system.processes import merged, size, together
from .entropy_control import EntropyControl
from .sharing import my_sequences, sum_gradients
from .update import Totals, Update

PATIENCE_WITH_NON_FINITE = 5  # updates in a row with a non-finite gradient before a run stops
PATIENCE_WITH_SCALING = 20  # in fp16, where each one halves the loss scale, from 2^16 on


def make_accelerator(device: torch.device) -> Accelerator:
    """An `Accelerator` for a device, also after a run on another one in the same process.

    accelerate allows one device per process; a notebook switches from one preset to the next.
    """
    known = AcceleratorState._shared_state
    if size() == 1 and known and known["device"].type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no")


class Learner:
    """Scores completions with the policy, and updates its weights.

    Args:
        policy: the model being trained.
        settings: of the run.
        entropy_control: marks tokens of each update; None for none.
    """

    def __init__(self, policy: Policy, settings: Settings,
                 entropy_control: EntropyControl | None = None):
        self.policy, self.settings, self.entropy_control = policy, settings, entropy_control
        self.accelerator = make_accelerator(policy.device)
        if policy.precision == "fp16":
            # accelerate's own scaler is for GPUs only, and allows one precision per process.
            self.accelerator.scaler = torch.amp.GradScaler(policy.device.type)
            # It gets its scale with the first loss, and a process may have no completion at first.
            self.accelerator.scaler.scale(torch.zeros((), device=policy.device))
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.non_finite_in_a_row: Counter[str] = Counter()  # updates by optimizer
        self.loss_is_finite = True  # since the last step
        self.place = ""  # the step and its batch in words, set by the trainer

    # Optimizers --------------------------------------------------------------------------------

    @property
    def optimizer(self):
        """The optimizer of all updates that name no other; None before a stage has begun."""
        return self.optimizers.get("main")

    def new_optimizer(self, name: str = "main") -> None:
        """A fresh AdamW: every stage starts with one, and without those of the stage before."""
        training = self.settings.training
        if name == "main":
            self.optimizers.clear()
        self.optimizers[name] = self.accelerator.prepare(torch.optim.AdamW(
            self.parameters, lr=0.0, betas=tuple(training.betas),
            weight_decay=training.weight_decay, fused=self.policy.precision != "fp16"))
        # accelerate would keep every optimizer that it has prepared, with its moments.
        self.accelerator._optimizers.clear()

    def optimizer_states(self) -> dict[str, dict]:
        """The state of every optimizer, by its name."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_optimizer_states(self, states: dict[str, dict]) -> None:
        """The inverse of `optimizer_states`."""
        for name, state in states.items():  # "main", which clears the others, is the first
            self.new_optimizer(name)
            self.optimizers[name].load_state_dict(state)

    # Scores ------------------------------------------------------------------------------------

    @torch.no_grad()
    def scores(self, sequences: Sequence[PromptCompletion], model=None,
               temperature: float | None = None) -> list[Tensor]:
        """Log-probabilities (T_i,) of every completion under the policy or another model."""
        temperature = temperature or self.settings.rl.temperature
        mine, device = my_sequences(sequences), self.policy.device

        def score() -> dict[int, Tensor]:
            result = {}
            for packed in self._pack([sequences[i] for i in mine]):
                scores, _ = self.policy.score(
                    packed.to(device), temperature=temperature, with_entropy=False,
                    chunk_tokens=self.settings.training.logit_chunk_tokens, model=model)
                owners, lengths = packed.sequence.unique_consecutive(return_counts=True)
                result |= {mine[i]: piece if size() == 1 else piece.cpu() for i, piece in zip(
                    owners.tolist(), scores.split(lengths.tolist()), strict=True)}
            return result

        found = merged(together(score))
        return [found[i].to(device) for i in range(len(sequences))]

    # 5. Update ---------------------------------------------------------------------------------

    def accumulate(self, update: Update, totals: Totals) -> bool:
        """Adds the gradient of an update's loss to the parameters; False if it has none.

        With several processes, each computes the gradient of some completions, and all get the sum.

        Args:
            totals: sums for the record are added to it.
        """
        keep = self._mark_and_choose(update)
        self._count_skipped(update, keep, totals)
        if not keep:
            return False
        shared = size() > 1
        mine = [keep[i] for i in my_sequences([update.sequences[i] for i in keep])]
        before = self._take_gradients() if shared else []
        part, finite = Totals() if shared else totals, True
        with self.policy.autocast():  # around all micro-batches: weights are cast once for them
            for packed in self._pack([update.sequences[i] for i in mine]):
                loss = self._loss(update, mine, packed, part)
                with torch.autocast(self.policy.device.type, enabled=False):
                    self.accelerator.backward(loss)
                finite &= bool(loss.isfinite())
        if shared:
            sum_gradients(self.parameters)
            for gradient, parameter in zip(before, self.parameters, strict=True):
                if gradient is not None:
                    parameter.grad = (gradient if parameter.grad is None
                                      else gradient + parameter.grad)
            mine_part = part, finite
            for other, other_finite in together(lambda: mine_part):
                totals.merge(other)
                finite &= other_finite
        self.loss_is_finite &= finite
        return True

    def _loss(self, update: Update, keep: list[int], packed: Packed, totals: Totals) -> Tensor:
        """The part of L = lambda_SFT L_SFT + lambda_RL L_RL - gamma H in one micro-batch.

        Args:
            keep: the completions of the update that were packed.
            packed: their N tokens.
        """
        rl, training, device = self.settings.rl, self.settings.training, self.policy.device
        owners = torch.tensor(keep)[packed.sequence]  # (N,) index into update.sequences

        def per_token(values: Tensor) -> Tensor:  # (S,) -> (N,)
            return values[owners].to(device)

        def flat(values: list[Tensor]) -> Tensor:  # S tensors (T_i,) -> (N,)
            return in_order(values, owners, device)

        w_sft, w_rl, w_entropy = (per_token(w) for w in (update.sft, update.rl, update.entropy))
        # Without an entropy term it is only needed if no rollout gives it for the record.
        with_entropy = (bool((w_entropy != 0).any()) or not (update.rl != 0).any()
                        or update.demonstration_loss is not None)
        log_p, entropies = self.policy.score(  # (N,), (N,)
            packed.to(device), temperature=per_token(update.temperature),
            chunk_tokens=training.logit_chunk_tokens, with_entropy=with_entropy)
        if with_entropy:
            totals.add("entropy", entropies.detach())
        l_sft = l_rl = entropy = log_p.new_zeros(())

        if (w_sft != 0).any():
            l_sft = (sft_loss(log_p, w_sft) if update.demonstration_loss is None else
                     (w_sft * demonstration_losses(update, owners, log_p, entropies)).sum())
            totals.add("loss/sft", l_sft.detach())

        if (w_rl != 0).any():
            old = log_p.detach() if update.old is None else flat(update.old)
            advantages = per_token(update.advantages)
            if update.token_advantages is not None:
                advantages = advantages + flat(update.token_advantages)
            clip = dict(zip(("epsilon_low", "epsilon_high"), self.clip_range, strict=True))
            marked = None if update.marked is None else flat(update.marked)
            l_rl = grpo_loss(
                log_p, old, advantages, w_rl, **clip, beta=rl.beta,
                kl=self._kl(log_p, old, None if update.anchor is None else flat(update.anchor)),
                no_gradient=marked if self.settings.entropy_control.kind == "clip_cov" else None)
            if marked is not None and self.settings.entropy_control.kind == "kl_cov":
                l_rl = l_rl + self.entropy_control.penalty(log_p, old, marked, w_rl)
            totals.add("loss/rl", l_rl.detach())
            sampled = w_rl != 0
            totals.add("kl/old", kl_to_old(log_p.detach(), old)[sampled])
            totals.add("clip_ratio", is_clipped(log_p.detach(), old, advantages, **clip)[
                sampled].float())

        if (w_entropy != 0).any():
            entropy = entropy_term(log_p, entropies, w_entropy, training.entropy)

        return hybrid_loss(l_sft, l_rl, entropy, lambda_sft=update.lambda_sft,
                           lambda_rl=update.lambda_rl, gamma=update.gamma)

    def _kl(self, log_p: Tensor, old: Tensor, anchor: Tensor | None) -> Tensor | float:
        """(N,) the divergence of `rl.kl_anchor` and `rl.kl_estimator`; 0.0 if beta is 0."""
        if self.settings.rl.beta == 0:
            return 0.0
        if not self.needs_anchor:
            return kl_to_old(log_p, old)
        return (k3(log_p, anchor) if self.settings.rl.kl_estimator == "k3"
                else kl_to_reference(log_p, old, anchor))

    def step(self, learning_rate: float, optimizer: str = "main",
             largest_norm: float = math.inf) -> float:
        """Clips the gradient, updates the weights, and clears it; returns the norm before clipping.

        A gradient with a norm above `largest_norm` is only cleared. If the loss was not finite, the
        weights do not change either, and the norm is NaN.

        Raises:
            UserError: the loss or its gradient was not finite several times in a row.
        """
        if optimizer not in self.optimizers:
            self.new_optimizer(optimizer)
        chosen, scaler = self.optimizers[optimizer], self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(chosen.optimizer)
        norm = float(self.accelerator.clip_grad_norm_(
            self.parameters, self.settings.training.gradient_clip))
        for group in chosen.param_groups:
            group["lr"] = learning_rate
        if not self.loss_is_finite:  # its gradient may still be finite
            norm = math.nan
        if norm > largest_norm or not self.loss_is_finite:
            chosen.zero_grad(set_to_none=True)  # AdamW ignores parameters without gradient
        self.loss_is_finite, finite = True, math.isfinite(norm)
        if finite or scaler is not None:  # the scaler skips by itself, and adjusts its scale
            chosen.step()
        chosen.zero_grad(set_to_none=True)
        self._count_non_finite(optimizer, finite)
        return norm

    def _count_non_finite(self, optimizer: str, finite: bool) -> None:
        """Stops the run after too many non-finite updates of an optimizer in a row."""
        in_a_row = 0 if finite else self.non_finite_in_a_row[optimizer] + 1
        self.non_finite_in_a_row[optimizer] = in_a_row
        fp16 = self.policy.precision == "fp16"
        if in_a_row >= (PATIENCE_WITH_SCALING if fp16 else PATIENCE_WITH_NON_FINITE):
            raise UserError(
                f"The loss or its gradient was not finite {in_a_row} updates in a row"
                + (f", the last at {self.place}" if self.place else "") + "; lower the "
                + ("learning rate" if self.policy.precision == "fp32" else
                   "learning rate or set model.precision=fp32") + ", then delete the run's folder.")

    # Which completions have a gradient ---------------------------------------------------------

    @property
    def clip_range(self) -> tuple[float, float]:
        """epsilon_low and epsilon_high of the ratio; infinite without clipping."""
        rl = self.settings.rl
        return (rl.epsilon_low, rl.epsilon_high) if rl.clip else (math.inf, math.inf)

    @property
    def needs_anchor(self) -> bool:
        """Whether the loss has the KL to a policy other than the one that sampled."""
        return self.settings.rl.beta > 0 and self.settings.rl.kl_anchor != "old"

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

    def _mark_and_choose(self, update: Update) -> list[int]:
        """The completions with a gradient, after the entropy control has marked its tokens."""
        keep, control = self.has_gradient(update), self.entropy_control
        if keep.any() and control is not None and update.marked is None:
            sampled = control.sampled_to_mark(update)
            if sampled:
                control.mark(update, sampled, self.scores([update.sequences[i] for i in sampled]))
                keep = self.has_gradient(update)  # what KL-Cov has marked has a gradient
        return keep.nonzero().squeeze(-1).tolist()

    def _count_skipped(self, update: Update, keep: list[int], totals: Totals) -> None:
        """Skipped answers count as what they are: not clipped, and no KL while the ratio is 1.

        Once the policy has moved, their KL is unknown; the mean is then over the others.
        """
        skipped = set((update.rl != 0).nonzero().squeeze(-1).tolist()) - set(keep)
        tokens = sum(len(update.sequences[i].completion) for i in skipped)
        if tokens:
            totals.add("loss/rl", torch.zeros(1))
            totals.add("clip_ratio", torch.zeros(1), tokens)
            if update.old is None:
                totals.add("kl/old", torch.zeros(1), tokens)

    # Helpers -----------------------------------------------------------------------------------

    def _pack(self, sequences: Sequence[PromptCompletion]) -> list[Packed]:
        return pack(sequences, self.settings.training.micro_batch_tokens, self.policy.pad_id)

    def _take_gradients(self) -> list[Tensor | None]:
        """The gradients of the parameters, which have none afterwards."""
        taken = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return taken


def demonstration_losses(update: Update, owners: Tensor, log_p: Tensor,
                         entropies: Tensor) -> Tensor:
    """(N,) the method's own loss of every token in L_SFT; 0 for tokens without a weight in it.

    Args:
        owners: (N,) the completion of each token.
        log_p, entropies: (N,).
    """
    indices, lengths = owners.unique_consecutive(return_counts=True)
    return torch.cat([
        update.demonstration_loss(i, piece, entropy) if update.sft[i] != 0
        else torch.zeros_like(piece)
        for i, piece, entropy in zip(indices.tolist(), log_p.split(lengths.tolist()),
                                     entropies.split(lengths.tolist()), strict=True)])


def in_order(values: Sequence[Tensor], owners: Tensor, device: torch.device | str) -> Tensor:
    """(N,) the values of the completions that packed tokens belong to, on the device.

    Args:
        values: (T_i,) per completion, on any device.
        owners: (N,) the completion of each token; the tokens of one are contiguous.
    """
    return torch.cat([values[i].to(device) for i in owners.unique_consecutive().tolist()])
