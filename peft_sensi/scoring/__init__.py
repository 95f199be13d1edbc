"""A model, its anatomy and calibration batches go in. A sensitivity score for each unit comes out."""
