"""What is measured on a model beside its training loss: evaluators behind one interface."""
