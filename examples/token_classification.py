"""Tune a word tagger (such as for named entities) under a budget: any encoder with a fast tokenizer, CoNLL files.

    python examples/token_classification.py --model bert-base-cased --data train.conll --validation dev.conll \\
        --budget 0.5 --output_dir out

Files: one word with its tag (O, B-person, I-person; also IOB1, IOBES and BILOU) per line, in columns separated by tabs
or spaces, and a blank line between sentences; or rows with lists of words and tags. `--text_column` and
`--label_column` are numbers of columns (-1 is the last one), or names. The first sub-word of a word gets its tag.
Entities are counted over the words of the file, even if a long sentence is read in several windows.
All options of `transformers.TrainingArguments` work. The adapter, the tokenizer and `metrics.json` are written to
`out`.
"""

from __future__ import annotations

from runner import TaskOptions, parse, read_for, readable_errors, run


@readable_errors()
def main(arguments: list[str] | None = None) -> None:
    options, data, training = parse(__doc__.splitlines()[0], TaskOptions, arguments=arguments)
    run(read_for("words", options.model, options.dtype, data, training.seed), options, training)


if __name__ == "__main__":
    main()
