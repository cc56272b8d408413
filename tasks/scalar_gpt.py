"""GPT-2 with one number per token in place of logits: the judge of imdb, a reward model, PPO's
critic."""

import torch.nn as nn

from model import GPT


class ScalarGPT(GPT):
    """Its scalar head starts at zero."""

    def __init__(self, config):
        super().__init__(config)
        self.scalar = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.scalar.weight)
        nn.init.zeros_(self.scalar.bias)

    @classmethod
    def from_gpt(cls, model):
        """A ScalarGPT with the weights, on the device and in the precision of a GPT."""
        scalar_model = cls(model.config).to(model.device)
        scalar_model.load_state_dict(model.state_dict(), strict=False)
        scalar_model.precision = model.precision
        return scalar_model

    def rewards(self, batch):
        """(N,) one number per answer of a packed data.Batch, read at the answer's last token."""
        return self.scalars_at(batch.last, batch)

    def values(self, batch):
        """(S,) one number per scored token, read at the token before it: the reward that the critic
        expects from the scored token on, before that token is chosen."""
        return self.scalars_at(batch.source, batch)

    def scalars_at(self, places, batch):
        """The scalar head at flat indices into the B * T tokens; the shape of `places`."""
        hidden = self.hidden(batch.tokens, batch.positions, batch.mask()).flatten(0, 1)
        return self.scalar(hidden.index_select(0, places).to(self.scalar.weight.dtype))[:, 0]
