"""Documents from continuous text: chunks of about equal size, or the articles of WikiText."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

from mlpmem_jax.core.errors import UserError

FORMATS = ("wikitext",)
"""Values of config.corpus.articles other than "": ways to detect where an article begins."""

# " = Title = "; section headings have more equals signs: " = = History = = ".
_WIKITEXT_TITLE = re.compile(r"\s*= [^=\s](.*[^=\s])? =\s*")


def chunk_lines(lines: Iterable[str], document_bytes: int) -> Iterator[str]:
    """Joins lines to documents, each ending at the first blank line after `document_bytes`.

    If there is no blank line within three times that size, a document ends at a line end. Lines of spaces are blank.
    """
    document, size = [], 0
    for line in lines:
        document.append(line)
        size += len(line.encode("utf-8", "surrogatepass"))
        is_blank = not line.strip()
        if size >= 4 * document_bytes or (is_blank and size >= document_bytes):
            yield "".join(document)
            document, size = [], 0
    if document:
        yield "".join(document)


def wikitext_articles(lines: Iterable[str], name: str) -> Iterator[str]:
    """Joins the lines of a WikiText file, or the rows of its data set, to whole articles.

    An article begins at a title between two blank lines, such as " = Robert Boulter = "; the blank lines distinguish
    it from similar lines within an article. Text before the first title belongs to the first article.

    Raises:
      UserError: there is no title.
    """
    article, has_title, follows_blank = [], False, True
    for line, following in itertools.pairwise(itertools.chain(lines, [""])):
        if follows_blank and not following.strip() and _WIKITEXT_TITLE.fullmatch(line):
            if has_title:
                yield "".join(article)
                article = []
            has_title = True
        article.append(line)
        follows_blank = not line.strip()
    if not has_title and any(line.strip() for line in article):
        raise UserError(
            f"{name}: config.corpus.articles='wikitext' expects titles, ' = Title = ' between two blank lines, found "
            "none; set it to '' for other kinds of text"
        )
    if article:
        yield "".join(article)
