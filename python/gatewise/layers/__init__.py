"""What users build models from: recurrent layers, the layers around them, and models of both."""
