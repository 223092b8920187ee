"""Attacks for the tests of SECURITY.md's promises: harmless payloads that leave a trace."""

from pathlib import Path


class Pickled:
    """An object whose pickle creates a file when it is read as an ordinary pickle."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def python_code(trace: Path) -> str:
    """A module that creates the file on import and has every class that may be requested."""
    return (f"open({str(trace)!r}, 'w').close()\n"
            "from transformers import PretrainedConfig, PreTrainedTokenizerFast, Qwen2ForCausalLM\n"
            "class Config(PretrainedConfig): model_type = 'mine'\n"
            "class Model(Qwen2ForCausalLM): pass\n"
            "class Tokenizer(PreTrainedTokenizerFast): pass\n")


def template_escapes(trace: Path) -> dict[str, str]:
    """Chat templates that try to leave Jinja's sandbox and open the file."""
    call = f"('{trace}', 'w')"
    return {"classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "globals": "{{ raise_exception.__globals__['__builtins__']['open']" + call + " }}",
            "attribute by filter": "{{ raise_exception|attr('__globals__') }}",
            "cycler": "{{ cycler.__init__.__globals__.__builtins__.open" + call + " }}",
            "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
            "import": "{% import 'os' as os %}{{ os.system('true') }}",
            "include": "{% include '/etc/hostname' %}",
            "changing a list": "{{ messages.append(1) }}"}


# Text that becomes a script, a broken picture, a link, or a formula if it is not escaped. Whatever
# gets through sets `window.pwned`, or is an element of the page.
SCRIPT = "<script>window.pwned = 'script'</script>"
PICTURE = "<img src=x onerror=\"window.pwned = 'picture'\">"
# void(): a script that returns a text would replace the page with it.
LINK = "[click](javascript:void(window.pwned='link'))"
OPEN_LINK = "<a href=\"javascript:void(window.pwned='anchor')\">click</a>"
TEXT = (f"{SCRIPT}{PICTURE}{LINK}{OPEN_LINK}\n\n# heading\n\n```html\n{SCRIPT}\n```\n"
        f"`{PICTURE}` | cell | {SCRIPT}\n</code></td></table>{SCRIPT}\n"
        f"$x$ $$\\href{{javascript:void(window.pwned='formula')}}{{y}}$$ "
        "\x1b[31mred\x1b]0;title\x07 \u202eback \ud800 "
        "![alt](javascript:void(window.pwned='image')) **bold** &lt;b&gt;")
