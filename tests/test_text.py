"""Captions as conditions: tokenisers by their rules, and frozen encoders against transformers itself."""

import builtins
import functools
import json
import shutil

import pytest
import torch

import scoresde as ss
from scoresde import text
from scoresde.data.items import Items
from scoresde.networks import MLP, TextStyle
from scoresde.predictions import KarrasPreconditioning
from scoresde.text import Pretrained, Tokens
from scoresde.training import Trainer

CAPTIONS = ["red cat: Man's, medium-dark skin tone", "blue cat", "red dog", "red owl", "cat"]


@pytest.fixture
def tokens(tmp_path):
    return Tokens().fit(CAPTIONS, tmp_path / "tokenizer.json")


def words_of(tokens, caption):
    """The tokens of a caption, by name, without its padding."""
    (numbers,) = tokens([caption])["text"]
    return [tokens.tokenizer.id_to_token(int(number)) for number in numbers if number >= 0]


def test_words_are_numbered_and_padded(tokens):
    encoded = tokens(["cat", "", "red cat"])["text"]
    assert encoded.dtype == torch.int64
    assert encoded.shape == (3, tokens.length) == (3, 8)
    assert (encoded >= 0).sum(dim=1).tolist() == [1, 0, 2]
    assert (encoded[:, 2:] == -1).all()
    assert encoded[0, 0] == encoded[2, 1] != encoded[2, 0]
    assert words_of(tokens, CAPTIONS[0]) == ["red", "cat", ":", "man's", ",", "medium-dark", "skin", "tone"]
    assert words_of(tokens, "RED  Cat") == ["red", "cat"]
    assert tokens.size == 1 + 11  # the unknown word, and those of the captions


def test_the_file_alone_restores_a_tokeniser(tokens, tmp_path):
    same = Tokens.read(tokens.file)
    assert (same.size, same.length, same.kind) == (tokens.size, tokens.length, tokens.kind)
    assert torch.equal(same(CAPTIONS)["text"], tokens(CAPTIONS)["text"])
    assert torch.equal(Tokens.read(same.save(tmp_path / "copy.json").file)(CAPTIONS)["text"], tokens(CAPTIONS)["text"])
    again = Tokens().fit(CAPTIONS, tmp_path / "again.json")
    assert again.file.read_bytes() == tokens.file.read_bytes()


def test_byte_pairs_spell_unknown_words_with_known_parts(tmp_path):
    captions = ["lower low lowest", "newer new newest", "low new"]
    tokens = Tokens(kind="bpe", size=30, length=9).fit(captions, tmp_path / "tokenizer.json")
    assert "".join(words_of(tokens, "renew")) == "renew"
    assert 1 < len(words_of(tokens, "slower")) < len("slower")
    assert Tokens.read(tokens.file).kind == "bpe"
    assert tokens.size <= 30
    tokens.check(["slower"])


def test_the_rarest_words_beyond_the_size_are_unknown(tmp_path):
    tokens = Tokens(size=4).fit(CAPTIONS, tmp_path / "tokenizer.json")
    assert tokens.size == 4
    assert words_of(tokens, "red cat medium-dark owl")[:2] == ["red", "cat"]
    assert words_of(tokens, "owl") == [text.UNKNOWN]


def test_long_captions_are_cut_with_a_warning(tmp_path):
    tokens = Tokens(length=2).fit(CAPTIONS, tmp_path / "tokenizer.json")
    with pytest.warns(UserWarning, match="1 of 5 captions have more than length=2 tokens and are cut"):
        encoded = tokens(CAPTIONS)["text"]
    assert encoded.shape == (5, 2)
    assert words_of(tokens, "red dog") == ["red", "dog"]


def test_unknown_words_are_named_with_near_ones(tokens):
    tokens.check(CAPTIONS)
    with pytest.warns(UserWarning, match=r"'red cta' has words that the training captions lack: 'cta'"):
        tokens.check(["red cta"])
    with pytest.warns(UserWarning, match=r"lack: 'xyzzy'$"):
        tokens.check(["dog xyzzy"])
    with pytest.raises(ValueError, match=r"'Owlz' \(near: owl\); a caption must have a known word"):
        tokens.check(["red", "Owlz"])


def test_a_missing_or_wrong_tokeniser_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Tokens must be trained before they encode captions: call fit"):
        Tokens()(["cat"])
    with pytest.raises(FileNotFoundError, match=r"there is no tokeniser at .*none\.json: restore the file"):
        Tokens.read(tmp_path / "none.json")
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(ValueError, match=r"wrong\.json must be a tokeniser of `tokenizers`; .*: restore the file"):
        Tokens.read(tmp_path / "wrong.json")
    with pytest.raises(ValueError, match="must be trained on captions with words; got 2 without any"):
        Tokens().fit(["", " "], tmp_path / "x.json")
    with pytest.raises(ValueError, match="kind must be one of words, bpe; got 'chars'"):
        Tokens(kind="chars")


def test_a_missing_package_says_what_to_install(monkeypatch):
    actual = builtins.__import__
    monkeypatch.setattr(text, "import_module", lambda name: actual(f"no_{name}"))
    with pytest.raises(ImportError, match=r"texts need the package tokenizers: pip install 'scoresde\[text\]'"):
        Tokens().fit(CAPTIONS, "x.json")


def test_a_padded_text_is_a_condition_and_padding_alone_is_none(tokens):
    style = TextStyle(tokens.size, tokens.length, width=4, depth=0, heads=1)
    model = ss.ScoreModel(MLP(2, width=8, text=style), ss.VP(), "noise", conditional=["text"])
    assert model.given(tokens(["cat", "red dog"])).predict(torch.zeros(2, 2), torch.tensor(0.5)) is not None
    with pytest.raises(ValueError, match="trained with the condition text for every sample, never without; got"):
        model.given(tokens(["cat", ""]))


BIAS = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny random models with tokenisers, by kind, as `save_pretrained` of transformers writes them."""
    import transformers
    from tokenizers import Tokenizer, processors

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "num_heads": 2, "num_layers": 1}
    t5 = transformers.T5Config(d_model=8, d_kv=4, d_ff=16, **sizes)
    umt5 = transformers.UMT5Config(d_model=8, d_kv=4, d_ff=16, **{**sizes, "num_layers": 2})
    clip = transformers.CLIPTextConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        eos_token_id=0,
        bos_token_id=1,
    )
    Tokens().fit(CAPTIONS, folder / "tokenizer.json")
    trained = Tokenizer.from_file(str(folder / "tokenizer.json"))
    trained.post_processor = processors.TemplateProcessing(single="$A [UNK]", special_tokens=[("[UNK]", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained, unk_token="[UNK]", pad_token="[UNK]", eos_token="[UNK]", model_max_length=12
    )
    encoders = {"t5": transformers.T5EncoderModel(t5), "clip": transformers.CLIPTextModel(clip)}
    encoders["umt5"] = transformers.UMT5EncoderModel(umt5)
    torch.nn.init.normal_(dict(encoders["umt5"].named_parameters())[BIAS])  # a bias of positions in the second layer
    for name, encoder in encoders.items():
        encoder.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("kind", ["t5", "umt5", "clip"])
def test_features_are_those_of_transformers(kind, models, tmp_path):
    import transformers

    captions = ["red cat", " ", "blue cat dog owl", "red cat"]  # the second has no word
    context = Pretrained(models / kind, length=6, cache=tmp_path)(captions)
    ((name, features),) = context.items()
    assert (name, features.shape, features.dtype) == ("context", (4, 6, 8), torch.float32)
    assert (~features.isnan().any(dim=2)).sum(dim=1).tolist() == [3, 0, 5, 3]  # the words and the end of the text
    encoder = {
        "t5": transformers.T5EncoderModel,
        "umt5": transformers.UMT5EncoderModel,
        "clip": transformers.CLIPTextModel,
    }[kind].from_pretrained(models / kind)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / kind)
    for caption, own in (("red cat", features[0]), ("blue cat dog owl", features[2])):
        ids = tokenizer(caption, return_tensors="pt").input_ids
        expected = encoder(input_ids=ids).last_hidden_state[0]  # alone, without padding
        torch.testing.assert_close(own[: ids.shape[1]], expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[3], features[0], equal_nan=True)


def test_features_are_kept_on_disk(models, tmp_path, monkeypatch):
    encoder = Pretrained(models / "t5", length=6, cache=tmp_path)
    first = encoder(["red cat", "dog", "dog"])["context"]
    (file,) = tmp_path.glob("*.npy")
    fresh = Pretrained(models / "t5", length=6, cache=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Pretrained, "_load", lambda self: pytest.fail("the encoder is not needed"))
        torch.testing.assert_close(fresh(["red cat", "dog"])["context"], first[:2], equal_nan=True)
    Pretrained(models / "clip", length=6, cache=tmp_path)(["red cat", "dog"])
    Pretrained(models / "t5", length=5, cache=tmp_path)(["red cat", "dog"])
    encoder(["red cat"])
    assert len(list(tmp_path.glob("*.npy"))) == 4
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.npy must hold the features of captions .*: delete it"):
        fresh(["red cat", "dog"])


def test_models_that_cannot_be_read_are_refused(models, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got 'nobody/nothing': `hf download nobody/nothing` fetches a model"):
        Pretrained("nobody/nothing", cache=None)(["cat"])
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="its model_type is 'bert', and not one of t5"):
        Pretrained(folder, cache=None)(["cat"])
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in (models / "t5").iterdir():
        if file.suffix == ".json":
            (pickled / file.name).write_bytes(file.read_bytes())
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must have a T5 encoder or CLIP text model with weights in safetensors files"):
        Pretrained(pickled, cache=None)(["cat"])


def test_weights_of_another_network_are_refused(models, tmp_path):
    """A layer without weights would be random."""
    config = json.loads((models / "t5" / "config.json").read_text())
    shutil.copytree(models / "t5", tmp_path / "deeper")
    (tmp_path / "deeper" / "config.json").write_text(json.dumps(config | {"num_layers": 2}))
    with pytest.raises(
        ValueError, match=r"deeper must have .*; its weights lack \d+ tensors, such as encoder\.block\.1"
    ):
        Pretrained(tmp_path / "deeper", cache=None)(["cat"])


def test_one_text_is_not_a_list_of_captions(tokens, models, tmp_path):
    """Its characters would be the captions."""
    for function in (tokens, tokens.check, Pretrained(models / "t5", cache=None)):
        with pytest.raises(TypeError, match=r"captions must be a list of texts; got 'cat': pass \['cat'\]"):
            function("cat")
    with pytest.raises(TypeError, match="captions must be a list of texts; got 3"):
        tokens(["cat", 3])
    with pytest.raises(TypeError, match="captions must be a list of texts; got 'cat'"):
        Tokens().fit("cat", tmp_path / "x.json")
    with pytest.raises(ValueError, match="needs at least one caption; got none"):
        Pretrained(models / "t5", cache=None)([])


def test_the_length_of_the_tokens_is_that_of_the_argument_and_not_of_the_file(tokens, tmp_path):
    with pytest.warns(UserWarning, match="1 of 2 captions have more than length=2 tokens and are cut"):
        short = Tokens(tokens.file, length=2)(["red blue cat", "dog"])["text"]
    assert torch.equal(short, torch.cat([tokens(["red blue"])["text"], tokens(["dog"])["text"]])[:, :2])
    raw = json.loads(tokens.file.read_text(encoding="utf-8"))
    (tmp_path / "raw.json").write_text(json.dumps(raw | {"truncation": None}))
    with pytest.raises(ValueError, match=r"raw\.json must have a truncation, as Tokens\.fit writes it; got none"):
        Tokens.read(tmp_path / "raw.json")


PLACES = {"left": (-1, 0), "centre": (0, 0), "right": (1, 0), "up": (0, 1), "middle": (0, 0), "down": (0, -1)}
PAIRS = [f"{across} {along}" for across in ("left", "centre", "right") for along in ("up", "middle", "down")]
HELD_OUT = "centre down"


def centre(caption):
    """The mean of the law of a caption: the sum of the places of its words."""
    return torch.tensor([PLACES[word] for word in caption.split()]).sum(dim=0).float()


def test_the_law_of_captions_is_learned_also_for_a_pair_of_words_that_never_occurred(tmp_path):
    """The law is N(centre, 0.2^2); without a caption it is the mixture of all, of standard deviation 0.84."""
    captions = [pair for pair in PAIRS if pair != HELD_OUT] * 150
    tokens = Tokens().fit(captions, tmp_path / "tokenizer.json")
    points = torch.stack([centre(caption) for caption in captions])
    points = points + 0.2 * torch.randn(points.shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    style = TextStyle(tokens.size, tokens.length, width=16, depth=0, heads=1, dropout=0.0)
    model = ss.ScoreModel(MLP(2, width=48, depth=2, text=style), ss.VP(), KarrasPreconditioning(0.85))
    adam = functools.partial(torch.optim.Adam, lr=5e-3)
    trainer = Trainer(steps=200, batch_size=128, optimizer=adam, decay="cosine", condition_dropout=0.1)
    loss, data_map = ss.losses.DenoisingScoreMatching(ss.losses.KarrasWeighting()), ss.DataMap(ss.data.Affine())
    trainer.fit(model, loss, Items(points, tokens(captions)), tmp_path, data_map)
    sampler = ss.samplers.PredictorCorrector(ss.samplers.Heun(), steps=8, grid=ss.samplers.bounded_karras)
    model.eval()
    for caption in ("left up", "right middle", HELD_OUT, ""):
        x = sampler(model.given(tokens([caption])), shape=(200, 2), seeds=range(200)).x
        mean, std = (centre(caption), 0.2) if caption else (torch.zeros(2), 0.84)
        assert float((x.mean(dim=0) - mean).abs().max()) < 0.3, caption
        assert 0.7 * std < float(x.std(dim=0).max()) < (0.6 if caption else 1.1), caption
