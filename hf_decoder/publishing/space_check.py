"""Has the page of a Space answer once, as it will there. `fresh_process` runs it, without this package or a token.

Its argument is JSON: the path of `app.py`, and the folder of the model, whose files are those of the Hub.
"""

import json
import os
import runpy
import sys

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    app = runpy.run_path(job["app"])
    answer = app["load"](job["folder"], None)
    app["build"](answer)
    next(answer("Hello", []))
    os._exit(0)  # the rest of the answer would be waited for
