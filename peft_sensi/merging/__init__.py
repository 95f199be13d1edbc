"""A merged model goes in; a folder or an ONNX file comes out, and a folder is read back with every check."""
