"""A model, its units and calibration batches go in. A sensitivity score for each unit comes out.

A unit is a head, an FFN neuron, a row of a Linear or a token. *Priming* is a short fine-tuning before the scores are
taken; it is undone afterwards. *Outlier* units carry most of a token's residual sum, so no plan should cut them.
"""
