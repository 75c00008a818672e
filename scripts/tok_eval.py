"""How well the tokenizer compresses: bytes per token on texts of several kinds, beside GPT-2's and GPT-4's tokenizers.

Reads the tokenizer, a stretch of both splits of `--data`, and the public ranks of the other two where they can be had
(kept in the base folder); prints a table and writes a report record.

    python -m scripts.tok_eval --data local --max-chars 100000      # tiny, on a CPU
    python -m scripts.tok_eval                                      # one GPU: no GPU is used
    python -m scripts.tok_eval                                      # eight GPUs: likewise
"""

import argparse
import os
import threading
from collections.abc import Callable

from nanochat import report
from nanochat.common import UserError, base_dir, print0, run_main
from nanochat.data.dataset import DEFAULT_DATA, document_batches, shard_paths
from nanochat.tokenizer import Tokenizer, tokenizer_dir

REFERENCES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}  # their names in tiktoken
DOCUMENT_CHARS = 10_000  # of each document of the data set, so that one long book does not stand for all

NEWS = """
HARBOUR TOWN VOTES TO KEEP ITS FERRY

After three hours of debate on Tuesday night the council of Marlow Bay voted 7-4 to keep the car ferry running through
the winter, at a cost of $1.2 million. "We've heard from nurses, from fishermen, from a man who hasn't missed a Sunday
service in forty years," said the council's chair. "You can't tell those people to drive 90 miles around the bay."

Ridership fell by 18% last year, and the older of the two boats, built in 1987, needs a new engine before the spring
inspection. Opponents argued that the money would be better spent on the bridge approach, where a landslide closed one
lane in November. The operator expects to publish its new timetable on 3 January; fares will rise from $6.50 to $7.25.
"""

CODE = '''
from dataclasses import dataclass, field


@dataclass
class RollingMean:
    """Mean of the last `size` values that were added."""

    size: int
    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> float:
        self.values.append(value)
        if len(self.values) > self.size:
            self.values.pop(0)  # the oldest one
        return sum(self.values) / len(self.values)


def smooth(path: str, size: int = 10) -> dict[str, float]:
    means, result = {}, {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            name, _, value = line.rstrip("\\n").partition("\\t")
            if not value:
                raise ValueError(f"{path}:{number}: expected 'name<TAB>value', got {line!r}")
            result[name] = means.setdefault(name, RollingMean(size)).add(float(value))
    return {name: mean for name, mean in sorted(result.items()) if mean != 0.0}
'''

MATHS = r"""
\begin{proof}
Let $f \colon [a, b] \to \mathbb{R}$ be continuous and suppose that $f(a) < 0 < f(b)$. Put
\[ S = \{ x \in [a, b] : f(t) \le 0 \text{ for all } t \in [a, x] \}, \qquad c = \sup S . \]
Since $f$ is continuous at $c$, for every $\varepsilon > 0$ there is a $\delta > 0$ with $|f(x) - f(c)| < \varepsilon$
whenever $|x - c| < \delta$. If $f(c) > 0$, choose $\varepsilon = \tfrac{1}{2} f(c)$: then $f > 0$ on $(c - \delta, c]$,
so no point of that interval belongs to $S$, which contradicts $c = \sup S$. If $f(c) < 0$, the same choice with
$-\tfrac{1}{2} f(c)$ puts $c + \tfrac{1}{2}\delta$ into $S$. Hence $f(c) = 0$.
\end{proof}
For example, $x^3 - 2x - 5$ is $-1$ at $x = 2$ and $16$ at $x = 3$; halving the interval ten times gives
$x \approx 2.0946$, and $\sum_{k=1}^{n} k^2 = n(n+1)(2n+1)/6$ makes $1^2 + 2^2 + \dots + 20^2 = 2870$.
"""

SCIENCE = """
In the light-dependent reactions of photosynthesis, photosystem II absorbs photons at about 680 nm and passes electrons
through plastoquinone and the cytochrome b6f complex to plastocyanin. Protons pumped into the thylakoid lumen drive
ATP synthase, while photosystem I reduces ferredoxin and, finally, NADP+ to NADPH. The Calvin-Benson cycle then spends
three ATP and two NADPH for every molecule of CO2 that ribulose-1,5-bisphosphate carboxylase/oxygenase (RuBisCO) fixes.

Because RuBisCO also accepts O2, C3 plants lose up to a quarter of the carbon they fix to photorespiration at 30 °C.
C4 grasses such as maize concentrate CO2 in their bundle-sheath cells instead, at the price of two further ATP per
molecule; succulents with crassulacean acid metabolism separate the two steps in time, opening their stomata at night.
"""

KOREAN = """
지난 주말 우리 가족은 기차를 타고 바닷가 마을에 다녀왔다. 아침 일찍 출발했는데도 역에는 벌써 사람들이 많았다.
창밖으로 논과 산이 지나가는 동안 동생은 김밥을 먹었고, 아버지는 신문을 읽으셨다. 도착하자마자 우리는 시장에 들러
생선과 미역을 샀다. 생선 한 마리에 5,000원이었는데, 주인아주머니가 조개를 한 줌 더 얹어 주셨다.

저녁에는 할머니 댁에서 된장찌개를 끓여 먹고 별을 보러 나갔다. 도시에서는 볼 수 없던 별들이 하늘에 가득했다.
"내년 여름에도 꼭 다시 오자." 어머니의 말씀에 모두 고개를 끄덕였다. 돌아오는 길에는 비가 조금 내렸지만,
아무도 우산을 펴지 않았다. 짧은 여행이었어도 오래 기억에 남을 것 같다.
"""

TEXTS = {"news": NEWS, "code": CODE, "maths": MATHS, "science": SCIENCE, "Korean": KOREAN}

Count = Callable[[str], int]  # number of tokens of a text


def load_references(timeout_seconds: float) -> dict[str, Count | str]:
    """A function that counts tokens for each of `REFERENCES`, or a word on why there is none."""
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(base_dir() / "tiktoken"))
    found: dict[str, Count | str] = {}

    def load() -> None:
        import tiktoken

        for title, name in REFERENCES.items():
            try:
                encoding = tiktoken.get_encoding(name)
                found[title] = lambda text, encoding=encoding: len(encoding.encode_ordinary(text))
            except (OSError, ValueError) as error:  # no network, or not the file that was expected
                found[title] = f"cannot be loaded ({type(error).__name__})"

    # A thread that may be left behind: the download has no time limit of its own.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return {title: found.get(title, f"no answer in {timeout_seconds:g} seconds") for title in REFERENCES}


def stretch(data: str, split: str, max_chars: int) -> str:
    """The beginnings of the first documents of a split, at most `max_chars` characters in all."""
    documents = (str(text) for _, batch in document_batches(shard_paths(data, split)) for text in batch)
    parts, room = [], max_chars
    for document in documents:
        parts.append(document[: min(room, DOCUMENT_CHARS)])
        room -= len(parts[-1])
        if room <= 0:
            break
    return "\n\n".join(parts)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # data
    parser.add_argument("--data", default=DEFAULT_DATA, help="hub repository, local folder or file, or 'local'")
    parser.add_argument("--max-chars", type=int, default=1_000_000, help="characters used of each split")
    # references
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds to wait for the other tokenizers' files")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # Inputs
    if args.max_chars < 1:
        raise UserError(f"--max-chars is {args.max_chars}, but must be 1 or more")
    tokenizer = Tokenizer.load(tokenizer_dir())
    texts = {name: text.strip() for name, text in TEXTS.items()}
    texts |= {f"data, {split}": stretch(args.data, split, args.max_chars) for split in ("train", "val")}

    # References
    references = load_references(args.timeout)
    counters: dict[str, Count] = {"nanochat": lambda text: len(tokenizer.encode(text))}
    for title, reference in references.items():
        if isinstance(reference, str):
            print0(f"{title}: skipped, {reference}")
        else:
            counters[title] = reference

    # Table
    table = []
    for name, text in texts.items():
        num_bytes = len(text.encode())
        ratios = {title: round(num_bytes / count(text), 3) for title, count in counters.items()}
        table.append({"text": name, "bytes": num_bytes, **ratios})
    print0("bytes per token".ljust(16) + f"{'bytes':>12}" + "".join(f"{title:>12}" for title in counters))
    for row in table:
        print0(f"{row['text']:16}{row['bytes']:>12,}" + "".join(f"{row[title]:>12.3f}" for title in counters))

    # Summary
    results = {"vocab_size": tokenizer.vocab_size}
    results |= {f"bytes per token, {row['text']}": row["nanochat"] for row in table}
    results |= {title: f"skipped, {reason}" for title, reason in references.items() if isinstance(reason, str)}
    report.append_record("tok_eval", settings=vars(args), results=results, table=table)


if __name__ == "__main__":
    run_main(main, parse_args)
