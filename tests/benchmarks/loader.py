"""transformers as a peer at cold starts, in a process of its own.

`python -m tests.benchmarks.loader SMALL LARGE THREADS`: a first token of the small model, so that everything is
imported and warm; then, for each prompt that comes in, the seconds from nothing to a first token of the large one.
"""

import sys
import time

import torch
import transformers


def first_token(directory: str, prompt: str) -> str:
    """The model and its tokenizer read, one token drawn, and its text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    tokens = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        answer = model.generate(
            tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
        )
    return str(tokenizer.decode(answer[0, tokens["input_ids"].shape[1] :]))


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    small, large, threads = sys.argv[1:4]
    torch.set_num_threads(int(threads))
    first_token(small, "warm")
    print("ready", flush=True)
    for prompt in sys.stdin:
        started = time.perf_counter()
        assert first_token(large, prompt.strip())
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
