"""The text encoder: padding takes no part, order does, and the null text is none."""

import re

import pytest
import torch

from scoresde.networks import Conditions, DiT, TextEncoder, TextStyle, UNet
from scoresde.networks.layers import ContextAttention
from tests.conftest import close, normal
from tests.networks.test_layers import difference, randomised

STYLE = TextStyle(vocabulary=7, length=6, width=4, depth=2, heads=2, dropout=0.5)
TEXT = torch.tensor([[1, 5, 0], [3, 3, -1], [6, -1, -1], [-1, -1, -1]])


def test_padding_takes_no_part():
    encoder = randomised(TextEncoder(STYLE))
    context, pooled = encoder(TEXT)
    assert (context.shape, pooled.shape) == ((4, 3, 4), (4, 4))
    assert torch.equal(context.isnan(), (TEXT == -1)[:, :, None].expand(4, 3, 4))
    longer, same = encoder(torch.cat([TEXT, torch.full((4, 3), -1)], dim=1))
    torch.testing.assert_close(longer[:, :3], context, equal_nan=True)
    torch.testing.assert_close(same, pooled)
    alone, own = encoder(TEXT[1:2, :2])  # without its padding
    torch.testing.assert_close((alone, own), (context[1:2, :2], pooled[1:2]))


def test_the_pooled_vector_is_the_mean_over_the_tokens_and_zero_for_no_text():
    context, pooled = randomised(TextEncoder(STYLE))(TEXT)
    close(pooled[:3], context[:3].nanmean(dim=1), rtol=1e-12)
    assert not pooled[3].any()


def test_every_token_and_their_order_matter():
    encoder = randomised(TextEncoder(STYLE))
    pooled = encoder(torch.tensor([[1, 2, 3], [3, 2, 1], [1, 2, 4], [5, 2, 3], [1, 2, 3]]))[1]
    assert difference(pooled[1:4], pooled[:1].expand(3, 4)) > 1e-3
    torch.testing.assert_close(pooled[4], pooled[0])


def test_depth_zero_is_the_normalised_sum_of_two_tables():
    encoder = randomised(TextEncoder(TextStyle(7, 6, width=4, depth=0, heads=1)))
    hidden = encoder.token.weight[TEXT[0]] + encoder.position.weight[:3]
    centred = hidden - hidden.mean(dim=1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    close(encoder(TEXT)[0][0], scaled * encoder.norm.weight + encoder.norm.bias, rtol=1e-10)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, "a text must be integers, the numbers of its tokens; got torch.float32"),
        (torch.zeros(2, dtype=torch.int64), ValueError, "expected texts of shape (B, L) with L <= 6; got (2,)"),
        (torch.zeros(2, 7, dtype=torch.int64), ValueError, "expected texts of shape (B, L) with L <= 6; got (2, 7)"),
        (torch.tensor([[7]]), ValueError, "the numbers of tokens must lie in 0 .. 6, or be -1 for padding"),
    ],
)
def test_wrong_texts_are_refused(text, error, message):
    with pytest.raises(error, match=re.escape(message)):
        TextEncoder(STYLE)(text)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="width must be a multiple of heads=3; got 4: change one of them"):
        TextStyle(7, 6, width=4, heads=3)
    with pytest.raises(ValueError, match=r"context_features must be 0 beside text, .*; got 3"):
        Conditions(context_features=3, text=STYLE)
    network = randomised(DiT(4, 1, 2, 8, 1, 2, text=STYLE))
    with pytest.raises(ValueError, match="expected 2 texts, one for each sample; got 4"):
        network(torch.zeros(2, 1, 4, 4).double(), torch.ones(2), {"text": TEXT})


def test_attention_to_a_context_is_a_softmax_over_its_known_vectors():
    layer, tokens, context = randomised(ContextAttention(4, 1, 3)), normal(2, 5, 4), normal(2, 6, 3, seed=1)
    context[0, 4:], context[1] = torch.nan, torch.nan
    output = layer(tokens, context)
    assert torch.equal(output[1], tokens[1])
    query = layer.query(layer.norm(tokens[0]))
    key, value = layer.context(context[0, :4]).chunk(2, dim=1)
    mixed = torch.softmax(query @ key.T / 2, dim=1) @ value
    close(output[0], tokens[0] + layer.out(mixed), rtol=1e-10)


@pytest.mark.parametrize("make", [lambda **c: DiT(4, 1, 2, 8, 1, 2, **c), lambda **c: UNet(4, 1, 4, (1, 2), 1, **c)])
def test_without_text_a_network_keeps_its_parameters_and_its_output(make):
    """Text adds parameters; those of the network without text keep their names, and the null text adds nothing."""
    text = {"text": STYLE} if "dit" in make().__module__ else {"conditions": Conditions(text=STYLE)}
    plain, conditional = randomised(make()), make(**text).double().eval()
    left, unexpected = conditional.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(any(part in name for part in ("time.text.", "time.pooled.", ".cross.")) for name in left)
    x, label = normal(4, 1, 4, 4), torch.tensor([0.1, 0.5, 1.0, 2.0])
    randomised(conditional.time.text)
    output = conditional(x, label, {"text": TEXT})
    close(output[3], plain(x, label)[3], rtol=1e-12)
    assert difference(output[:3], plain(x, label)[:3]) > 1e-6
    with pytest.raises(ValueError, match=r"without a condition 'vector' \(it takes text\)"):
        conditional(x, label, {"vector": x})
