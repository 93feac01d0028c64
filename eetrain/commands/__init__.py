"""The verbs of the command line, one module and one public function each."""
