"""A model, its anatomy and calibration batches go in; a sensitivity score for each unit comes out."""
