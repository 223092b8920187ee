"""Imported before anything else: keeps a warning of no use out of notebooks.

Without ipywidgets the progress bars of other libraries say so on import, with a path of this
machine. No such bar is shown in a notebook of this project.
"""

import warnings

warnings.filterwarnings("ignore", message="IProgress not found")
