"""Write a GPT-2 of one layer, with random weights and a token a character, to ./toy_model."""

import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

tokens = [*"0123456789+=", "<end>"]
words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<end>"))
words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
tokenizer.save_pretrained("toy_model")

tf.set_seed(1)
sizes = {"vocab_size": len(tokens), "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
end = {"bos_token_id": len(tokens) - 1, "eos_token_id": len(tokens) - 1}
tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **end)).save_pretrained("toy_model")
