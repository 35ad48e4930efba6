#!/usr/bin/env python3
"""tokenize.py: makes what train_gpt_fp8 reads of text: token shards, masked shards for instruction tuning, multiple-choice files.

    tokenize.py --tokenizer gpt2 --out data/web text/*.txt more.jsonl        shards data/web_000000.bin, data/web_000001.bin, ...
    tokenize.py --tokenizer gpt2 --out data/web --dataset HuggingFaceFW/fineweb:sample-10BT:train
    tokenize.py --tokenizer gpt2 --out data/chat --sft chat.jsonl            masked shards
    tokenize.py --tokenizer gpt2 --out data/quiz.bin --choices quiz.jsonl    a multiple-choice file for --eval-data
    tokenize.py --tokenizer gpt2 --write-tokenizer gpt2_tokenizer.bin        for --tokenizer: tokens as text
    tokenize.py --tokenizer gpt2 --ids 'The dog is'                          tokens by number, for --prompt

Tokenizers: bytes (each byte a token, 256 ends a text; needs no package), gpt2 (package tiktoken), FILE.json (package tokenizers), hf:NAME (package transformers).
Data sets of --dataset NAME[:CONFIG[:SPLIT]] come by the package datasets. Packages are imported when they are asked for.

A .jsonl file has a record a line. Any other file is text: one document, or with --documents line or paragraph several. Before each document stands the token that
ends a text. Work is divided among --workers processes; what is written does not depend on how many. Files are written beside and get their names when all is well.

A shard is 256 int32 of header, then tokens: 20240520, 1, count with uint16 tokens for vocabularies up to 65536, else 20240801, 7, count with uint32. A masked shard
is 20240801, 8, count with uint32, whose top bit is set where the token, as a target, does not count in the loss.
"""
import sys

sys.path.pop(0)  # this folder, or Python's own module tokenize, which other modules import, would be this file

import argparse  # noqa: E402
import collections  # noqa: E402
import glob  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
from array import array  # noqa: E402

CHUNK_BYTES = 1 << 20  # of input that a worker takes at a time
MASKED = 1 << 31
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class BadInput(Exception):
    pass


# ---- tokenizers: encode(text as bytes, where it stands) -> list of tokens; vocab; end; pieces() -> bytes of every token ----


def package(name):
    try:
        return __import__(name)
    except ImportError as error:
        raise BadInput(f"the Python package {name} is needed for this and cannot be imported ({error}); python3 -m pip install {name} gets it") from None


def fetched(what, get):
    """get(), by a package that may have to download; what goes wrong there is said in one line"""
    try:
        return get()
    except BadInput:
        raise
    except Exception as error:  # each package has its own kinds
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{what} cannot be had: {first}") from None


def as_text(data, where):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: byte {error.start} is not UTF-8") from None


class Bytes:
    vocab, end = 257, 256

    def encode(self, data, where):
        return data

    def pieces(self):
        return [bytes([i]) for i in range(256)] + [b"<|endoftext|>"]


class Tiktoken:
    def __init__(self, name):
        tiktoken = package("tiktoken")
        self.coding = fetched(f"--tokenizer: {name}", lambda: tiktoken.get_encoding(name))
        self.vocab, self.end = self.coding.n_vocab, self.coding.eot_token

    def encode(self, data, where):
        return self.coding.encode_ordinary(as_text(data, where))

    def pieces(self):
        return [self.coding.decode_single_token_bytes(i) for i in range(self.vocab)]


class Json:
    """A tokenizer.json of the package tokenizers, from a file or of a transformers tokenizer"""

    def __init__(self, tokenizer, name, end):
        self.tokenizer = tokenizer
        self.vocab = tokenizer.get_vocab_size()
        found = [e for e in ((end,) if end else ENDS) if tokenizer.token_to_id(e) is not None]
        if not found:
            raise BadInput(f"--tokenizer: {name} has no token {end or ' or '.join(ENDS)}, which would end a text; --end TOKEN names it")
        self.end = tokenizer.token_to_id(found[0])

    def encode(self, data, where):
        return self.tokenizer.encode(as_text(data, where), add_special_tokens=False).ids

    def pieces(self):
        spec = json.loads(self.tokenizer.to_str())
        kinds = set()

        def note(part):
            if isinstance(part, dict):
                kinds.add(part.get("type"))
                for value in part.values():
                    note(value)
            elif isinstance(part, list):
                for value in part:
                    note(value)

        note([spec.get("decoder"), spec.get("pre_tokenizer")])
        added = {t["id"]: t["content"] for t in spec.get("added_tokens", [])}
        byte_of = {}
        if "ByteLevel" in kinds:  # printable bytes stand for themselves, the others for characters from U+0100 on
            plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
            byte_of = {chr(b): b for b in plain}
            byte_of.update({chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in plain)})
        pieces = []
        for i in range(self.vocab):
            token = added.get(i, self.tokenizer.id_to_token(i))
            if token is None:
                pieces.append(b"")
            elif i in added or not token:
                pieces.append(token.encode())
            elif byte_of:
                pieces.append(bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode())
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                pieces.append(bytes([int(token[3:5], 16)]))
            elif "WordPiece" in kinds:
                pieces.append(token[2:].encode() if token.startswith("##") else b" " + token.encode())
            else:
                pieces.append(token.replace("\u2581", " ").encode())
        return pieces


def open_tokenizer(name, end):
    if name == "bytes":
        return Bytes()
    if name == "gpt2":
        return Tiktoken("gpt2")
    if name.startswith("hf:"):
        transformers = package("transformers")
        tokenizer = fetched(f"--tokenizer: {name[3:]}", lambda: transformers.AutoTokenizer.from_pretrained(name[3:], use_fast=True))
        if not getattr(tokenizer, "is_fast", False):
            raise BadInput(f"--tokenizer: {name[3:]} has no tokenizer.json")
        return Json(tokenizer.backend_tokenizer, name[3:], end or tokenizer.eos_token)
    if not name.endswith(".json"):
        raise BadInput(f"--tokenizer: '{name}' is not known; allowed: bytes, gpt2, FILE.json, hf:NAME")
    if not os.path.isfile(name):
        raise BadInput(f"--tokenizer: there is no file '{name}'")
    tokenizers = package("tokenizers")
    return Json(fetched(f"--tokenizer: '{name}'", lambda: tokenizers.Tokenizer.from_file(name)), name, end)


# ---- reading: chunks of (where, line or text or record), in order ----


def chunks(args, progress):
    chunk, size = [], 0

    def full():
        nonlocal chunk, size
        done, chunk, size = chunk, [], 0
        return done

    for path in args.inputs:
        lines = path.endswith(".jsonl") or args.sft or args.choices
        with open(path, "rb") as file:
            if not lines and args.documents == "file":
                data = file.read()
                chunk.append((path, data))
                size += len(data)
                progress.add(len(data))
            else:
                paragraph, first = b"", 1
                for number, line in enumerate(file, 1):
                    progress.add(len(line))
                    if not lines and args.documents == "paragraph":
                        if line.strip():
                            first = first if paragraph else number
                            paragraph += line
                            continue
                        line, paragraph, where = paragraph.rstrip(b"\r\n"), b"", first
                    else:
                        line, where = line.rstrip(b"\r\n"), number
                    if line.strip():
                        chunk.append((f"{path}:{where}", line))
                        size += len(line)
                    if size >= CHUNK_BYTES:
                        yield lines, full()
                if paragraph:
                    chunk.append((f"{path}:{first}", paragraph.rstrip(b"\r\n")))
            if chunk:
                yield lines, full()
    if args.dataset:
        name, config, split = (args.dataset.split(":") + ["", ""])[:3]
        datasets = package("datasets")
        rows = fetched(f"--dataset: {name}", lambda: datasets.load_dataset(name, config or None, split=split or "train"))
        progress.total = len(rows)
        for number, row in enumerate(rows):
            chunk.append((f"{args.dataset}, row {number}", row))
            progress.add(1)
            if len(chunk) == 1000:
                yield True, full()
        if chunk:
            yield True, full()


# ---- what a worker makes of a chunk ----

worker = None  # its Worker, in a process of its own or in this one


def field(record, where, *names):
    for name in names:
        if name in record:
            return record[name]
    raise BadInput(f"{where}: there is no field {' or '.join(repr(n) for n in names)}; its fields are {', '.join(map(repr, record)) or 'none'}")


def string(value, where, name):
    if not isinstance(value, str):
        raise BadInput(f"{where}: {name} is no text but {json.dumps(value, default=str)[:60]}")
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"{where}: {name} has half a surrogate pair at character {error.start}") from None


class Worker:
    def __init__(self, args):
        self.args = args
        self.tokenizer = open_tokenizer(args.tokenizer, args.end)
        self.type = "I" if args.sft or self.tokenizer.vocab > 65536 else "H"

    def encode(self, data, where):
        return self.tokenizer.encode(data, where)

    def record(self, where, item):
        if not isinstance(item, bytes):
            return item
        try:
            record = json.loads(as_text(item, where))
        except ValueError as error:
            raise BadInput(f"{where}: this is no JSON: {error}") from None
        if not isinstance(record, dict):
            raise BadInput(f"{where}: a record is a JSON object, {{...}}, and this is {item[:40].decode('utf-8', 'replace')}")
        return record

    def tokens(self, chunk):
        records, items = chunk
        out = array(self.type)
        for where, item in items:
            if self.args.sft:
                self.tuning(out, where, self.record(where, item))
                continue
            text = string(field(self.record(where, item), where, self.args.field), where, self.args.field) if records else item
            out.append(self.tokenizer.end)
            out.extend(self.encode(text, where))
        return out

    # What is asked is masked, what is to be answered counts, with the token that ends it
    def tuning(self, out, where, record):
        end = self.tokenizer.end
        out.append(end | MASKED)
        if "messages" not in record:
            parts = [(string(field(record, where, "prompt"), where, "prompt"), False), (string(field(record, where, "response"), where, "response"), True)]
        else:
            parts = []
            messages = record["messages"]
            if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
                raise BadInput(f"{where}: messages is no list of objects with role and content")
            for number, message in enumerate(messages):
                role = string(field(message, f"{where}, message {number}", "role"), where, "role")
                content = string(field(message, f"{where}, message {number}", "content"), where, "content")
                if role == b"assistant":
                    parts += [(b"assistant: ", False), (content, True)]
                else:
                    parts.append((role + b": " + content + b"\n", False))
            if not any(counts for _, counts in parts):
                raise BadInput(f"{where}: no message is by the role assistant, so there is nothing to learn")
        for text, counts in parts:
            tokens = self.encode(text, where)
            out.extend(tokens if counts else [t | MASKED for t in tokens])
            if counts:
                out.append(end)

    # An example: label, context, completions
    def examples(self, chunk):
        made = []
        for where, item in chunk[1]:
            record = self.record(where, item)
            context = string(field(record, where, "context", "ctx"), where, "context")
            endings, label = field(record, where, "endings", "completions"), field(record, where, "label")
            if not isinstance(endings, list) or len(endings) < 2:
                raise BadInput(f"{where}: the endings are no list of two texts or more")
            if isinstance(label, str) and label.isdigit():
                label = int(label)
            if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(endings):
                raise BadInput(f"{where}: the label is {json.dumps(label, default=str)}; allowed for {len(endings)} endings: 0 to {len(endings) - 1}")
            before = list(self.encode(context, where)) or [self.tokenizer.end]
            join = self.args.join.encode()
            completions = [list(self.encode(join + string(e, where, "an ending"), where)) for e in endings]
            if not all(completions):
                raise BadInput(f"{where}: ending {completions.index([])} is empty")
            made.append((label, before, completions))
        return made


def start_worker(args):
    global worker
    worker = Worker(args)


def work(chunk):
    return (worker.examples if worker.args.choices else worker.tokens)(chunk)


# results of all chunks in their order; few are on their way at a time
def results(args, progress):
    if args.workers == 1:
        for chunk in chunks(args, progress):
            yield work(chunk)
        return
    with multiprocessing.Pool(args.workers, start_worker, (args,)) as pool:
        waiting = collections.deque()
        for chunk in chunks(args, progress):
            waiting.append(pool.apply_async(work, (chunk,)))
            if len(waiting) > 2 * args.workers:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


# ---- writing ----


def header(*numbers):
    return words("i", numbers) + bytes(4 * (256 - len(numbers)))


def words(kind, numbers):
    a = numbers if isinstance(numbers, array) else array(kind, numbers)
    if sys.byteorder == "big":
        a = array(a.typecode, a)
        a.byteswap()
    return a.tobytes()


class Files:
    """Files that get their names together, when all are whole; else they are removed"""

    def __init__(self):
        self.names = []

    def open(self, path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self.names.append(path)
        return open(self.part(path), "wb")

    def part(self, path):
        return f"{path}.part{os.getpid()}"

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for path in self.names:
            try:
                if kind is None:
                    os.replace(self.part(path), path)
                else:
                    os.remove(self.part(path))
            except FileNotFoundError:
                pass


def write_shards(args, progress):
    old = glob.glob(glob.escape(args.out) + "_" + 6 * "[0-9]" + ".bin")
    if old:
        raise BadInput(f"--out: there is a {sorted(old)[0]} already; remove it (and those beside it), or choose another name")
    kind = "I" if args.sft or worker.tokenizer.vocab > 65536 else "H"
    magic = (20240801, 8) if args.sft else (20240801, 7) if kind == "I" else (20240520, 1)
    total = 0
    with Files() as files:
        file, count = None, 0

        def finish():
            file.seek(0)
            file.write(header(*magic, count))
            file.close()

        for tokens in results(args, progress):
            at = 0
            while at < len(tokens):
                if file is None:
                    file, count = files.open(f"{args.out}_{len(files.names):06d}.bin"), 0
                    file.write(header(*magic, 0))
                some = tokens[at : at + args.shard_tokens - count]
                file.write(words(kind, some))
                at, count, total = at + len(some), count + len(some), total + len(some)
                if count == args.shard_tokens:
                    finish()
                    file = None
        if file is not None:
            finish()
        if total == 0:
            raise BadInput("the input has no document: there is nothing to write")
    progress.end()
    plural = "s" if len(files.names) > 1 else ""
    what = "masked uint32" if args.sft else "uint32" if kind == "I" else "uint16"
    print(f"{total} tokens ({what}) in {len(files.names)} shard{plural}, {args.out}_000000.bin on; train with --vocab {worker.tokenizer.vocab}")


def write_choices(args, progress):
    examples = [e for made in results(args, progress) for e in made]
    if not examples:
        raise BadInput("the input has no record: there is nothing to write")

    def stream(size, mark):
        rows = []
        for number, (label, context, completions) in enumerate(examples):
            row = [mark, 0, number, label, len(completions), len(context), *context]
            for c in completions:
                row += [len(c), *c]
            row[1] = size * len(row)
            rows.append(row)
        return rows

    rows = stream(2, 65535)
    narrow = worker.tokenizer.vocab <= 65535 and len(rows) <= 65535 and all(row[1] <= 65535 for row in rows)
    if not narrow:
        rows = stream(4, 0xFFFFFFFF)
    with Files() as files, files.open(args.out) as file:
        file.write(header(20240522, 1 if narrow else 2, len(rows), max(row[1] for row in rows)))
        for row in rows:
            file.write(words("H" if narrow else "I", row))
    progress.end()
    print(f"{len(rows)} examples ({'uint16' if narrow else 'uint32'}) in {args.out}; score with --eval-data {args.out}")


def write_tokenizer(path):
    pieces = worker.tokenizer.pieces()
    longest = max(map(len, pieces))
    with Files() as files, files.open(path) as file:
        file.write(header(20240328, 2, len(pieces), worker.tokenizer.end))
        for piece in pieces:
            file.write(bytes([min(len(piece), 255)]) + piece[:255])
    cut = f"; tokens longer than 255 bytes are cut ({sum(len(p) > 255 for p in pieces)})" if longest > 255 else ""
    print(f"{len(pieces)} tokens in {path}{cut}")


# ---- progress ----


class Progress:
    """A bar on a terminal's stderr; silent elsewhere"""

    def __init__(self, total):
        self.total, self.done, self.start, self.shown = total, 0, time.monotonic(), 0.0
        self.live = sys.stderr.isatty()

    def add(self, n):
        self.done += n
        now = time.monotonic()
        if not self.live or now - self.shown < 0.1:
            return
        self.shown = now
        share = min(self.done / self.total, 1.0) if self.total else 0.0
        left = (now - self.start) * (1 / share - 1) if share > 0 else 0.0
        bar = "#" * int(30 * share)
        sys.stderr.write(f"\r[{bar:<30}] {100 * share:5.1f} %, {int(left) // 60}:{int(left) % 60:02d} left \033[K")
        sys.stderr.flush()

    def end(self):
        if self.live and self.shown:
            sys.stderr.write("\r\033[K")


# ---- the command line ----


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 on")
    return int(text)


def main():
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise BadInput(message)

    p = Parser(prog="tokenize.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("inputs", nargs="*", metavar="INPUT", help="text files, and .jsonl files of records")
    p.add_argument("--dataset", metavar="NAME[:CONFIG[:SPLIT]]", help="a Hugging Face data set")
    p.add_argument("--tokenizer", required=True, metavar="T", help="bytes, gpt2, FILE.json, hf:NAME")
    p.add_argument("--end", metavar="TOKEN", help="the token that ends a text, where a tokenizer.json has another than the usual ones")
    p.add_argument("--out", metavar="NAME", help="shards are NAME_000000.bin and on; with --choices the file")
    p.add_argument("--field", default="text", help="of a record: its text (default: text)")
    p.add_argument("--documents", choices=["file", "line", "paragraph"], default="file", help="what is a document in text files (default: file)")
    p.add_argument("--shard-tokens", type=positive, default=100_000_000, metavar="N", help="tokens of a shard (default: 100000000)")
    p.add_argument("--workers", type=positive, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: one a core)")
    p.add_argument("--sft", action="store_true", help="records with prompt and response, or messages, become masked shards")
    p.add_argument("--choices", action="store_true", help="records with context, endings or completions, and label become a multiple-choice file")
    p.add_argument("--join", default=" ", metavar="TEXT", help="with --choices: what stands between context and ending (default: a space)")
    p.add_argument("--write-tokenizer", metavar="FILE", help="write llm.c's tokenizer file, and nothing else")
    p.add_argument("--ids", metavar="TEXT", help="print the text's tokens, and nothing else")
    args = p.parse_args()
    if args.sft and args.choices:
        raise BadInput("--sft and --choices make different files; give one of them")
    alone = args.write_tokenizer or args.ids is not None
    if not alone and args.out is None:
        raise BadInput("--out NAME is missing: where to write to")
    if not alone and not args.inputs and not args.dataset:
        raise BadInput("there is no input: give files, or --dataset NAME")
    for path in args.inputs:
        if not os.path.isfile(path):
            raise BadInput(f"there is no file '{path}'")
    start_worker(args)
    if args.write_tokenizer:
        write_tokenizer(args.write_tokenizer)
    if args.ids is not None:
        print(*worker.encode(args.ids.encode(), "--ids"))
    if not alone:
        progress = Progress(sum(os.path.getsize(path) for path in args.inputs))
        (write_choices if args.choices else write_shards)(args, progress)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are parallel
    try:
        main()
    except BadInput as error:
        sys.exit(print(f"tokenize.py: {error}", file=sys.stderr) or 2)
    except OSError as error:
        sys.exit(print(f"tokenize.py: {error}", file=sys.stderr) or 1)
    except KeyboardInterrupt:
        sys.exit(130)
