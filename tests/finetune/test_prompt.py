"""Soft prompts: embeddings in place of those of tokens, in our model and in transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.batch import Batch
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.train.objective import scalar_arrays
from tests.finetune.peft_fixtures import FIXTURES
from tests.finetune.test_parts import config
from tests.finetune.test_prefix import standing_on
from tests.models.test_front import P, logits, made

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("family", ["gemma2", pytest.param("llama3", marks=pytest.mark.slow)])
def test_a_prompt_is_more_tokens_in_a_larger_table(family: str) -> None:
    """Whose embeddings are those that it starts from, moved."""
    model, base, weights = made("prompt", family)
    tokens_BT = np.random.default_rng(1).integers(61, size=(2, 9))
    table_VD, moved_PD = base["embed"], weights["embed"].prompt_PD
    start_P = np.arange(P) * 61 // P
    swapped = {**base, "embed": table_VD.at[start_P].add(moved_PD)}
    texts_BT = np.where(np.isin(tokens_BT, start_P), 1, tokens_BT)
    assert 1 not in start_P
    x_BTD = jax.jit(model.hidden)(swapped, np.concatenate([np.tile(start_P, (2, 1)), texts_BT], axis=1))[0]
    whole_BTV = model.unembed(model.head(base), x_BTD)  # a head that is tied keeps the table that it had
    np.testing.assert_allclose(logits(model, weights, texts_BT), whole_BTV[:, P:], rtol=0, atol=1e-5)


def test_auxiliary_losses_are_means_over_the_text() -> None:
    """As without a prompt: what divides a loss in the gradient is the number of tokens that it is summed over."""
    experiment = assemble.assemble(without_data(config("mixtral", {"adapter": {"name": "prompt", "length": P}})))
    objective = experiment.task.objective
    frozen, params = assemble.frozen_params(experiment), assemble.initial_state(experiment).params
    positions_BT = np.array([[*range(12)], [*range(9), -1, -1, -1]], np.int32)
    tokens_BT, weights_BT = np.ones((2, 12), np.int32), (positions_BT >= 0).astype(np.float32)
    batch = Batch(tokens_BT, tokens_BT, weights_BT, np.arange(2, dtype=np.int32), positions_BT=positions_BT)

    def weights() -> tuple[jax.Array, jax.Array]:
        _, metrics = objective.loss(params, frozen, batch, None, scalar_arrays(objective.scalars))
        return objective.weight(batch)["auxiliary"], metrics["balance_loss"][1]

    assert jax.jit(weights)() == (21, 21)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_logits_and_gradient_are_those_of_transformers(name: str) -> None:
    """Given the prompt as `inputs_embeds`."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, weights, moved = standing_on(FIXTURES / name / "base", "prompt")
    tokens_BT = np.random.default_rng(2).integers(weights["embed"].table.shape[0], size=(2, 7))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / name / "base")
    table = theirs.get_input_embeddings().weight.detach()
    start_P = torch.arange(P) * len(table) // P
    prompt_PD = (table[start_P] + torch.tensor(np.asarray(moved["embed"]["prompt"]))).requires_grad_()
    text_BTD = table[torch.tensor(tokens_BT)]
    whole_BTD = torch.cat([prompt_PD.expand(2, -1, -1), text_BTD], dim=1)
    wanted = theirs(inputs_embeds=whole_BTD).logits[:, P:]
    wanted.logsumexp(-1).sum().backward()

    np.testing.assert_allclose(logits(model, weights, tokens_BT), wanted.detach().numpy(), rtol=0, atol=1e-4)

    def total(prompt_PD: jax.Array) -> jax.Array:
        params = {**weights, "embed": weights["embed"].replace(prompt_PD=prompt_PD)}
        return jax.nn.logsumexp(model.logits(params, jnp.asarray(tokens_BT)), axis=-1).sum()

    gradient_PD = jax.jit(jax.grad(total))(weights["embed"].prompt_PD)
    np.testing.assert_allclose(gradient_PD, prompt_PD.grad.numpy(), rtol=1e-4, atol=1e-4)
