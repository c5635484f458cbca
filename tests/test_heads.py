"""The head branch does to the hidden states what the model itself does on its way to logits, whatever the family."""

import pytest
import torch
from datasets import Dataset
from steps import check, reverse_kl, student, take_step
from tiny import VOCAB_SIZE, make_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    PhiConfig,
)

from trl_opd.heads import HeadCall, add_head_branch

SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
CONFIGS = {
    "softcap": Gemma2Config(**SMALL, final_logit_softcapping=2.0),
    "logit scale": CohereConfig(**{**SMALL, "num_key_value_heads": 2}, logit_scale=0.25),
    "divided logits": GraniteConfig(**SMALL, logits_scaling=4.0),
    "multiplied logits": HyperCLOVAXConfig(**SMALL, logits_scaling=0.5),
    "bias": PhiConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
    "GPT-2": GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3),
}


def make(name, seed):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).double()
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    model.generation_config.eos_token_id = list(range(1, 13))
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_of_a_family_is_that_of_its_own_logits(tmp_path, name):
    # Prompts of one length: Gemma 2 gives NaN on a padded row in float64
    prompts = Dataset.from_dict({"prompt": ["abc", "def", "xyz", "a b"]})
    fields = {"temperature": 0.8, "disable_dropout": True, "arguments": {"train_dataset": prompts}}
    step = take_step(tmp_path, model=make(name, 0), teacher=make(name, 1), **fields)
    check(step, reverse_kl, temperature=0.8, model=make(name, 0).eval(), teacher=make(name, 1).eval())


def test_tied_embeddings_get_both_gradients(tmp_path):
    step = take_step(tmp_path, model=student(tie_word_embeddings=True), teacher=make_model(hidden_size=24, seed=1))
    assert "lm_head.weight" not in step.gradient
    check(step, reverse_kl, model=student(tie_word_embeddings=True), teacher=make_model(hidden_size=24, seed=1))


def test_without_the_keyword_the_forward_is_what_it_was():
    model, untouched = make_model(), make_model()
    add_head_branch(model)
    add_head_branch(model)  # a second time changes nothing
    ids = torch.arange(1, 9)[None]
    assert torch.equal(model(input_ids=ids).logits, untouched(input_ids=ids).logits)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, untouched(input_ids=ids, labels=ids).loss)
    hidden, head = model(input_ids=ids, head_call=HeadCall(lambda hidden, head, aux_loss: (hidden, head)))
    assert torch.equal(hidden @ head.weight.T, untouched(input_ids=ids).logits)


def test_a_patched_model_still_generates():
    model, untouched = make_model().eval(), make_model().eval()
    add_head_branch(model)
    ids = torch.arange(7, 12)[None]
    out = [m.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (model, untouched)]
    assert torch.equal(*out)
