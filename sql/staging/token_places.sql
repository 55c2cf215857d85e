-- What is written at some tokens, given as a list of their numbers, and where.
--
-- Grain:   one row per token of the list that is a real one of a visible document; no number may come twice.
-- Reads:   token_owners, token_pieces
-- Units:   position counts from 0 inside the sequence.
-- Ask it:  from token_places([0, 4711])
create or replace macro token_places(ids) as table
select token_id, vocab_id, pieces.piece, document_id, owners.key, owners.source, position
from token_owners(ids) as owners
join token_pieces(ids) as pieces using (token_id);
