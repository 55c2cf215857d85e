-- One token in the text around it.
--
-- Grain:   one row; none if there is no such token.
-- Reads:   token_texts
-- Units:   before and after count tokens; the text never leaves the document. If the bytes of a letter are spread over
--          several tokens, the whole letter is part of token_text. In context, the marks « and » of the text itself
--          become ‹ and ›; the other texts are as in the corpus.
-- Parameters: token bigint, before bigint = 20, after bigint = 20
-- Ask it:  what is written around token 4711?  from context(4711)
create or replace macro context(token, before := 20, after := 20) as table
select token_id, piece, text_before, token_text, text_after, context, key, source, position
from token_texts([token], before, after);
