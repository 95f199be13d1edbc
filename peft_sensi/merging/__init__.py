"""A model with an adapter goes in; a merged model comes out, as a folder or an ONNX file. Folders can be loaded."""
