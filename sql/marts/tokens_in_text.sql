-- Some tokens in the text around them, for a list of token ids.
--
-- Grain:   one row per different token of the list that is real and in a visible document, in corpus order.
-- Reads:   token_surroundings
-- Units:   before and after count tokens; the text never leaves the document. pieces has one entry for each token of
--          the span, and place is the token's place in it, from 1, as in contexts.
-- Parameters: tokens bigint[], before bigint = 12, after bigint = 12
-- Ask it:  what is written around tokens 17 and 4711?  from tokens_in_text([17, 4711])
create or replace macro tokens_in_text(tokens, before := 12, after := 12) as table
select found.token_id, found.place, found.pieces, found.key, found.source, found.position
from token_surroundings(
    list_distinct(tokens), []::struct(token_id bigint, value double)[], before, after
) as found
order by found.token_id;
