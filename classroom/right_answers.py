"""Right solutions of the exercises in other styles than ours. All of them must get full marks.

Each class is one student, who may have left out an exercise. The functions are graded like a
submission by `python -m classroom.assignment --check`. Copies and submissions never see this file.
"""

import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from classroom.exercises import functions, parse, split_target
from classroom.rules import text_to_grade
from data import Encoded, ranking_to_pairs
from experiments.ppo import judged
from runtime.errors import UserError
from sample import logps_of, sample_answers
from tasks.sampled import rank_answers
from train_dpo import implicit_reward, log_partition, plackett_luce


class Loops:
    """One number after the other, as in the equations."""

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.shape
        D = C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.reshape(B, T, self.n_head, D).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.append(k, v)
        keys = k.shape[2]
        heads = []
        for h in range(self.n_head):
            scores = q[:, h] @ k[:, h].transpose(1, 2) / math.sqrt(D)
            if mask is not None:
                scores = scores + mask[:, 0]
            else:
                later = torch.ones(T, keys, dtype=torch.bool, device=x.device).triu(keys - T + 1)
                scores = scores.masked_fill(later, float("-inf"))
            heads.append(scores.softmax(-1) @ v[:, h])
        return self.c_proj(torch.cat(heads, dim=-1))

    def logps(self, batch):
        scored = self.token_logps(batch)
        return torch.stack([scored[batch.answer_of == n].sum() for n in range(batch.n_answers)])

    def token_logps(self, batch):
        h = self.hidden(batch.tokens, batch.positions, batch.mask())
        h = h.reshape(-1, h.size(-1))[batch.source]
        log_probs = torch.log_softmax(self.head(h), dim=-1)
        return torch.stack([log_probs[i, token] for i, token in enumerate(batch.target)])

    def bradley_terry(r_w, r_l):
        return -F.softplus(r_l - r_w)

    def implicit_reward(pi_logps, ref_logps, beta):
        return beta * pi_logps - beta * ref_logps

    def dpo_loss(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
        losses = []
        for w, l in zip(yw_idxs.tolist(), yl_idxs.tolist()):
            margin = (pi_logps[w] - ref_logps[w]) - (pi_logps[l] - ref_logps[l])
            losses.append(-F.logsigmoid(beta * margin))
        rewards = beta * (pi_logps - ref_logps)
        return torch.stack(losses), rewards.detach()

    def dpo_gradient(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
        r = implicit_reward(pi_logps, ref_logps, beta)
        gradient = torch.zeros_like(pi_logps)
        for w, l in zip(yw_idxs.tolist(), yl_idxs.tolist()):
            pull = beta * torch.sigmoid(r[l] - r[w])
            gradient[w] -= pull
            gradient[l] += pull
        return gradient

    def plackett_luce(rewards, ranking):
        flat = ranking.reshape(-1, ranking.shape[-1])
        logps = []
        for row in flat:
            r = rewards[row[row >= 0]]
            logp = rewards.sum() * 0
            for k in range(len(r)):
                logp = logp + r[k] - torch.logsumexp(r[k:], 0)
            logps.append(logp)
        return torch.stack(logps).reshape(ranking.shape[:-1])

    def log_partition(ref_logps, rewards, beta):
        terms = (ref_logps + rewards / beta).unbind(-1)
        return functools.reduce(torch.logaddexp, terms)

    def optimal_policy(ref_logps, rewards, beta):
        log_z = log_partition(ref_logps, rewards, beta)
        return torch.stack([ref + r / beta - log_z for ref, r in
                            zip(ref_logps.unbind(-1), rewards.unbind(-1))], dim=-1)

    def mask(self):
        B, T = self.tokens.shape
        group, answer = self.group.tolist(), self.answer.tolist()
        visible = torch.zeros(B, T, T, dtype=torch.bool)
        for b in range(B):
            for i in range(T):
                for j in range(i + 1):
                    if group[b][i] == group[b][j] and answer[b][j] in (0, answer[b][i]):
                        visible[b, i, j] = True
        return visible.to(self.tokens.device)

    def rank_answers(prompt, answers, rewards):
        kept_answers, kept_rewards = [], []
        for answer, reward in zip(answers, rewards):
            if reward not in kept_rewards:
                kept_answers.append(answer)
                kept_rewards.append(reward)
        if len(kept_answers) < 2:
            return None
        order = []
        while len(order) < len(kept_answers):
            left = [i for i in range(len(kept_answers)) if i not in order]
            best = left[0]
            for i in left:
                if kept_rewards[i] > kept_rewards[best]:
                    best = i
            order.append(best)
        return {"prompt": prompt, "answers": kept_answers, "ranking": order,
                "rewards": kept_rewards}

    def ranking_to_pairs(ranking):
        pairs = []
        for i in range(len(ranking)):
            for j in range(i + 1, len(ranking)):
                pairs.append((ranking[i], ranking[j]))
        return pairs

    def warmup(step, n_warmup):
        if n_warmup == 0 or step >= n_warmup:
            return 1.0
        return (step + 1) / n_warmup

    def update(model, optimizer, scaler, lr, clip):
        scaler.unscale_(optimizer)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.sqrt(sum((grad ** 2).sum() for grad in grads))
        if norm > clip:
            for grad in grads:
                grad *= clip / norm
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        for p in model.parameters():
            p.grad = None
        return norm

    def reward_loss(rewards, yw_idxs, yl_idxs):
        losses = []
        for w, l in zip(yw_idxs.tolist(), yl_idxs.tolist()):
            losses.append(-F.logsigmoid(rewards[w] - rewards[l]))
        return torch.stack(losses)

    def token_rewards(logps, ref_logps, scores, mask, beta):
        rewards = beta * (ref_logps - logps)
        for n in range(len(mask)):
            rewards[n, int(mask[n].sum()) - 1] += scores[n]
        return rewards

    def gae(rewards, values, gamma, lam):
        N, L = rewards.shape
        advantages = torch.zeros_like(rewards)
        for n in range(N):
            for t in range(L):
                for k in range(L - t):
                    after = values[n, t + k + 1] if t + k + 1 < L else 0.0
                    delta = rewards[n, t + k] + gamma * after - values[n, t + k]
                    advantages[n, t] += (gamma * lam) ** k * delta
        return advantages

    def whiten(advantages, mask):
        white = torch.zeros_like(advantages)
        white[mask] = (advantages[mask] - advantages[mask].mean()) / advantages[mask].std()
        return white

    def clipped_loss(logps, old_logps, advantages, clip):
        losses = []
        for new, old, advantage in zip(logps, old_logps, advantages):
            ratio = torch.exp(new - old)
            clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
            losses.append(-torch.minimum(ratio * advantage, clipped * advantage))
        return torch.stack(losses)

    def clipped_value_loss(values, old_values, returns, clip):
        losses = []
        for value, old, wanted in zip(values, old_values, returns):
            near = torch.clamp(value, old - clip, old + clip)
            losses.append(torch.maximum((value - wanted) ** 2, (near - wanted) ** 2) / 2)
        return torch.stack(losses)

    def sample_round(policy, reference, prompts, score_answers, eot, number, args):
        one_each = []
        for prompt in prompts:
            for _ in range(args.samples):
                one_each.append(Encoded(prompt, [], []))
        seed = 10**6 * (args.seed + 1) + number
        sampled = sample_answers(policy, [item.prompt for item in one_each], args.max_new_tokens,
                                 seed, eot)
        for item, answer in zip(one_each, sampled):
            item.answers.append(answer)
        rewards = judged(one_each, score_answers, eot, args)
        found = []
        for n, prompt in enumerate(prompts):
            answers, their_rewards = [], []
            for k in range(n * args.samples, (n + 1) * args.samples):
                if sampled[k] not in answers:
                    answers.append(sampled[k])
                    their_rewards.append(rewards[k])
            row = rank_answers(prompt, answers, their_rewards)
            if row is not None:
                item = Encoded(prompt, row["answers"], ranking_to_pairs(row["ranking"]))
                [ref_logps] = logps_of(reference, [item], args.row_length)
                found.append(Encoded(prompt, item.answers, item.pairs, ref_logps))
        if len(found) == 0:
            raise UserError(f"round {number + 1}: no prompt got two answers of different reward")
        return found, sampled, rewards


class Vectorised:
    """No loop at all."""

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        if mask is None and T > 1:
            att = att.masked_fill(~torch.tril(torch.ones(T, T, device=x.device)).bool(), -math.inf)
        elif mask is not None:
            att = att + mask
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))

    def logps(self, batch):
        scored = self.token_logps(batch)
        sums = torch.zeros(batch.n_answers, dtype=scored.dtype, device=scored.device)
        return sums.scatter_add(0, batch.answer_of, scored)

    def token_logps(self, batch):
        hidden = self.hidden(batch.tokens, batch.positions, batch.mask())
        logits = self.head(hidden.view(-1, hidden.size(-1))[batch.source], self.vocab_multiple)
        return logits.log_softmax(-1).gather(-1, batch.target[:, None]).squeeze(-1)

    def bradley_terry(r_w, r_l):
        return r_w - torch.logaddexp(r_w, r_l)

    def dpo_loss(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
        pi_logratios = pi_logps[yw_idxs] - pi_logps[yl_idxs]
        ref_logratios = ref_logps[yw_idxs] - ref_logps[yl_idxs]
        losses = -F.logsigmoid(beta * (pi_logratios - ref_logratios))
        rewards = beta * (pi_logps - ref_logps).detach()
        return losses, rewards

    def dpo_gradient(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
        n = len(pi_logps)
        sign = F.one_hot(yl_idxs, n) - F.one_hot(yw_idxs, n)
        sign = sign.to(pi_logps.dtype)
        r = implicit_reward(pi_logps, ref_logps, beta)
        return beta * torch.sigmoid(sign @ r) @ sign

    def plackett_luce(rewards, ranking):
        padding = ranking < 0
        r = rewards[ranking.masked_fill(padding, 0)].masked_fill(padding, -1e30)
        later = r.flip(-1).logcumsumexp(-1).flip(-1)
        return torch.where(padding, 0.0, r - later).sum(-1)

    def plackett_luce_loss(pi_logps, ref_logps, rankings, beta):
        rewards = beta * (pi_logps - ref_logps)
        return -plackett_luce(rewards, rankings), rewards.detach()

    def log_partition(ref_logps, rewards, beta):
        x = ref_logps + rewards / beta
        largest = x.max(dim=-1, keepdim=True).values
        return (x - largest).exp().sum(-1).log() + largest.squeeze(-1)

    def optimal_policy(ref_logps, rewards, beta):
        return (ref_logps + rewards / beta).log_softmax(-1)

    def mask(self):
        T = self.tokens.shape[1]
        place = torch.arange(T, device=self.tokens.device)
        causal = place[:, None] >= place[None, :]
        group = self.group.unsqueeze(2) == self.group.unsqueeze(1)
        is_prompt = (self.answer == 0).unsqueeze(1)
        same_answer = self.answer.unsqueeze(2) == self.answer.unsqueeze(1)
        return causal.logical_and(group).logical_and(is_prompt.logical_or(same_answer))

    def rank_answers(prompt, answers, rewards):
        first = {}
        for answer, reward in zip(answers, rewards):
            first.setdefault(reward, answer)
        if len(first) < 2:
            return None
        rewards, answers = list(first.keys()), list(first.values())
        ranking = sorted(range(len(rewards)), key=rewards.__getitem__, reverse=True)
        return {"prompt": prompt, "answers": answers, "ranking": ranking, "rewards": rewards}

    def ranking_to_pairs(ranking):
        import itertools
        return list(itertools.combinations(ranking, 2))

    def warmup(step, n_warmup):
        return min((step + 1) / n_warmup, 1.0) if n_warmup > 0 else 1.0

    def update(model, optimizer, scaler, lr, clip):
        from torch.nn.utils import clip_grad_norm_
        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm_(model.parameters(), max_norm=clip)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)
        return grad_norm

    def reward_loss(rewards, yw_idxs, yl_idxs):
        return F.softplus(rewards[yl_idxs] - rewards[yw_idxs])

    def token_rewards(logps, ref_logps, scores, mask, beta):
        last = mask.long().cumsum(1).argmax(1, keepdim=True)
        penalty = beta * (logps - ref_logps)
        return torch.zeros_like(logps).scatter(1, last, scores[:, None]) - penalty

    def gae(rewards, values, gamma, lam):
        L = rewards.size(1)
        deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
        steps = torch.arange(L)[None, :] - torch.arange(L)[:, None]
        discount = torch.where(steps >= 0, (gamma * lam) ** steps.clamp(min=0), 0.0)
        return deltas @ discount.T.to(deltas)

    def whiten(advantages, mask):
        n = mask.sum()
        mean = (advantages * mask).sum() / n
        variance = (((advantages - mean) * mask) ** 2).sum() / (n - 1)
        return (advantages - mean) * mask / (variance.sqrt() + 1e-8)

    def clipped_loss(logps, old_logps, advantages, clip):
        ratio = torch.exp(logps - old_logps)
        return torch.max(-advantages * ratio, -advantages * torch.clip(ratio, 1 - clip, 1 + clip))

    def clipped_value_loss(values, old_values, returns, clip):
        clipped = torch.max(torch.min(values, old_values + clip), old_values - clip)
        errors = torch.stack([values - returns, clipped - returns]) ** 2
        return errors.max(0).values / 2

    def sample_round(policy, reference, prompts, score_answers, eot, number, args):
        K = args.samples
        asked = [prompts[i // K] for i in range(K * len(prompts))]
        answers = sample_answers(policy, asked, args.max_new_tokens,
                                 10**6 * (args.seed + 1) + number, eot)
        items = [Encoded(prompt, [answer], []) for prompt, answer in zip(asked, answers)]
        rewards = judged(items, score_answers, eot, args)
        different = [i for i in range(len(answers))
                     if answers[i] not in answers[i - i % K:i]]
        rows = [rank_answers(prompt, [answers[i] for i in different if i // K == n],
                             [rewards[i] for i in different if i // K == n])
                for n, prompt in enumerate(prompts)]
        ranked = [Encoded(row["prompt"], row["answers"], ranking_to_pairs(row["ranking"]))
                  for row in rows if row]
        if not ranked:
            raise UserError(f"round {number + 1}: no prompt got two answers of different reward")
        ref_logps = logps_of(reference, ranked, args.row_length)
        return [Encoded(item.prompt, item.answers, item.pairs, logps)
                for item, logps in zip(ranked, ref_logps)], answers, rewards


class Terse:
    """Other formulas for the same numbers."""

    def forward(self, x, mask=None, cache=None):
        from torch.nn.functional import scaled_dot_product_attention as attend
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                   for t in self.c_attn(x).chunk(3, dim=-1))
        if cache is not None:
            k, v = cache.append(k, v)
        y = attend(q, k, v, mask) if mask is not None else attend(q, k, v, is_causal=q.size(2) > 1)
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def logps(self, batch):
        scored = self.token_logps(batch)
        belongs = batch.answer_of == torch.arange(batch.n_answers, device=scored.device)[:, None]
        return torch.where(belongs, scored, 0.0).sum(1)

    def token_logps(self, batch):
        logits = self.head(self.hidden(batch.tokens, batch.positions, batch.mask()))
        logits = logits.flatten(0, 1)[batch.source]
        right = logits[torch.arange(len(batch.target)), batch.target]
        return right - logits.logsumexp(-1)

    def bradley_terry(r_w, r_l):
        both = torch.stack(torch.broadcast_tensors(r_w, r_l), dim=-1)
        return both.log_softmax(-1)[..., 0]

    def dpo_loss(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
        rewards = implicit_reward(pi_logps, ref_logps, beta)
        margins = rewards.index_select(0, yw_idxs) - rewards.index_select(0, yl_idxs)
        losses = F.binary_cross_entropy_with_logits(margins, torch.ones_like(margins),
                                                    reduction="none")
        return losses, rewards.detach().clone()

    def dpo_gradient(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
        log_ratios = pi_logps - ref_logps
        z = beta * (log_ratios[yw_idxs] - log_ratios[yl_idxs])
        pull = -beta * (1 - z.sigmoid())
        gradient = pi_logps.new_zeros(pi_logps.shape)
        gradient.scatter_add_(0, yw_idxs, pull)
        gradient.scatter_add_(0, yl_idxs, -pull)
        return gradient

    def plackett_luce(rewards, ranking):
        drawn = ranking >= 0
        r = rewards[ranking.clamp(min=0)]
        K = ranking.size(-1)
        # Which answers are still there at each draw: itself and later ones, but no padding.
        there = torch.ones(K, K, dtype=torch.bool).triu() & drawn[..., None, :]
        there = there | torch.eye(K, dtype=torch.bool)
        left = r[..., None, :].expand(*r.shape, K).masked_fill(~there, float("-inf"))
        return ((r - left.logsumexp(-1)) * drawn).sum(-1)

    def log_partition(ref_logps, rewards, beta):
        x = ref_logps + rewards / beta
        return x[..., 0] - x.log_softmax(-1)[..., 0]

    def optimal_policy(ref_logps, rewards, beta):
        x = ref_logps + rewards / beta
        return x - x.logsumexp(dim=-1, keepdim=True)

    def mask(self):
        size = self.tokens.size(1)
        at, to = slice(None), None
        visible = (self.group[at, at, to] == self.group[at, to, at]).tril()
        return visible & ~((self.answer[at, to, at] != 0)
                           & (self.answer[at, at, to] != self.answer[at, to, at])) & (size > 0)

    def rank_answers(prompt, answers, rewards):
        firsts = [i for i, r in enumerate(rewards) if r not in rewards[:i]]
        answers, rewards = [answers[i] for i in firsts], [rewards[i] for i in firsts]
        if len(rewards) <= 1:
            return None
        return dict(prompt=prompt, answers=answers, rewards=rewards,
                    ranking=[rewards.index(r) for r in sorted(rewards)[::-1]])

    def ranking_to_pairs(ranking):
        return [(w, l) for i, w in enumerate(ranking) for l in ranking[i + 1:]]

    def warmup(step, n_warmup):
        return 1 if step + 1 >= n_warmup else (step + 1) / n_warmup

    def update(model, optimizer, scaler, lr, clip):
        optimizer.param_groups[0]["lr"] = lr
        for group in optimizer.param_groups[1:]:
            group["lr"] = lr
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return norm

    def reward_loss(rewards, yw_idxs, yl_idxs):
        pairs = torch.stack([rewards[yw_idxs], rewards[yl_idxs]], dim=1)
        return -pairs.log_softmax(1)[:, 0]

    def token_rewards(logps, ref_logps, scores, mask, beta):
        is_last = mask & ~F.pad(mask[:, 1:], (0, 1))
        return scores[:, None] * is_last - beta * (logps - ref_logps)

    def gae(rewards, values, gamma, lam):
        advantages, advantage = [], 0.0
        after = torch.zeros_like(values[:, 0])
        for r, v in zip(rewards.flip(1).T, values.flip(1).T):
            advantage = r + gamma * after - v + gamma * lam * advantage
            after = v
            advantages.insert(0, advantage)
        return torch.stack(advantages, dim=1)

    def whiten(advantages, mask):
        variance, mean = torch.var_mean(advantages[mask])
        return ((advantages - mean) * torch.rsqrt(variance + 1e-12)).masked_fill(~mask, 0)

    def clipped_loss(logps, old_logps, advantages, clip):
        ratio = (logps - old_logps).exp()
        bound = torch.where(advantages > 0, 1 + clip, 1 - clip)
        too_far = torch.where(advantages > 0, ratio > bound, ratio < bound)
        return -torch.where(too_far, bound, ratio) * advantages

    def clipped_value_loss(values, old_values, returns, clip):
        clipped = old_values + torch.clip(values - old_values, -clip, clip)
        return 0.5 * torch.max((values - returns).abs(), (clipped - returns).abs()).square()

    def sample_round(policy, reference, prompts, score_answers, eot, number, args):
        asked = sum(([prompt] * args.samples for prompt in prompts), [])
        answers = sample_answers(policy, asked, args.max_new_tokens,
                                 1_000_000 + args.seed * 1_000_000 + number, eot)
        rewards = judged([Encoded(x, [y], []) for x, y in zip(asked, answers)], score_answers, eot,
                         args)
        items = []
        for start in range(0, len(asked), args.samples):
            mine = range(start, start + args.samples)
            # Of equal rewards and of equal answers, the first one stays.
            kept = [i for i in mine if all(rewards[i] != rewards[j] and answers[i] != answers[j]
                                           for j in range(start, i))]
            if len(kept) > 1:
                pairs = [(a, b) for a, i in enumerate(kept) for b, j in enumerate(kept)
                         if rewards[i] > rewards[j]]
                items.append((asked[start], [answers[i] for i in kept], pairs))
        if not items:
            raise UserError(f"round {number + 1}: no prompt got two answers of different reward")
        ref_logps = logps_of(reference, [Encoded(*item) for item in items], args.row_length)
        return [Encoded(*item, logps) for item, logps in zip(items, ref_logps)], answers, rewards


def solutions_of(exercise):
    """[{"module.function": text}]: what each student wrote for an exercise."""
    source = Path(__file__).read_text(encoding="utf-8")
    found, solutions = functions(source), []
    for student in (Loops, Vectorised, Terse):
        texts = {}
        for target in exercise.functions:
            module, path = split_target(target)
            name = path.rpartition(".")[2]
            node = found.get(f"{student.__name__}.{name}")
            if node is not None:
                texts[target] = text_to_grade(node, name, parse(source), Path(__file__).name,
                                              module)
        if texts:
            solutions.append(texts)
    return solutions
