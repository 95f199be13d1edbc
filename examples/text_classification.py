"""Tune a text classifier or regressor under a budget: any encoder, your own files or a data set of the Hub.

    python examples/text_classification.py --model bert-base-uncased --data train.tsv --validation dev.tsv \\
        --flops 0.4 --trainable 0.05 --output_dir out
    python examples/text_classification.py --model bert-base-uncased --data nyu-mll/glue --subset sst2 --budget 0.5 \\
        --output_dir out

Data is read as by the command `peft-sensi train`, with options of the same names: tables (.tsv, .csv, .json, .jsonl,
.parquet, also compressed), folders of them, and data sets. Labels are classes, several classes per row, or numbers.
All options of `transformers.TrainingArguments` work. The adapter, the tokenizer and `metrics.json` are written to
`out`.
"""

from __future__ import annotations

from runner import TaskOptions, parse, read_for, readable_errors, run


@readable_errors()
def main(arguments: list[str] | None = None) -> None:
    options, data, training = parse(__doc__.splitlines()[0], TaskOptions, arguments=arguments)
    run(read_for("text", options.model, options.dtype, data, training.seed), options, training)


if __name__ == "__main__":
    main()
