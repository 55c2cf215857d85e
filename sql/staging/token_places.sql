-- The vocabulary entry, document and position of some tokens, for a list of token ids.
--
-- Grain:   one row per token of the list that is real and in a visible document. No token may be listed twice.
-- Reads:   token_owners, token_pieces
-- Units:   position counts from 0 inside the sequence.
-- Ask it:  from token_places([0, 4711])
create or replace macro token_places(ids) as table
select token_id, vocab_id, pieces.piece, document_id, owners.key, owners.source, position
from token_owners(ids) as owners
join token_pieces(ids) as pieces using (token_id);
