"""The process in which `panic` has texts tokenised to see whether the library gives up: what it says stays here."""

import json
import sys


def main() -> None:
    """Tokenises what stands on standard input; status 1 where the library panics."""
    from tokenizers import Tokenizer

    state, texts = json.load(sys.stdin)
    try:
        Tokenizer.from_str(state).encode_batch(texts, add_special_tokens=False)
    except Exception:
        return  # told where the texts are tokenised in earnest
    except BaseException as error:  # a panic
        print(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
