"""Tune a question answering model under a budget: any encoder with a fast tokenizer, files in SQuAD format.

    python examples/question_answering.py --model bert-base-uncased --data train.json --validation dev.json \\
        --budget 0.5 --output_dir out

Files: JSON in the format of SQuAD 1.1 or 2.0 (data > paragraphs > context, qas > question, answers > text,
answer_start), or rows with question, context and answers. A long text is read in windows that overlap by `--stride`
tokens. The answer is the best span of all windows, cut from the original text. Questions without answers are learned
if the training rows have some. Without validation rows, whole articles are held out.
All options of `transformers.TrainingArguments` work. The adapter, the tokenizer and `metrics.json` are written to
`out`.
"""

from __future__ import annotations

from runner import TaskOptions, parse, read_for, readable_errors, run


@readable_errors()
def main(arguments: list[str] | None = None) -> None:
    options, data, training = parse(__doc__.splitlines()[0], TaskOptions, arguments=arguments)
    run(read_for("answers", options.model, options.dtype, data, training.seed), options, training)


if __name__ == "__main__":
    main()
