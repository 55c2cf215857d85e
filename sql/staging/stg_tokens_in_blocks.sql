-- The tokens that were encoded, as a bit for each of 120 tokens that follow one another: a set of all tokens would fill
-- the memory.
--
-- Grain:   one row per block of 120 tokens with encoded tokens of visible documents.
-- Reads:   stg_tokens_encoded
-- Units:   block = token_id // 120; bit token_id % 120 of tokens is 1 if the token was encoded.
-- Ask it:  which tokens did two runs encode?
create or replace view stg_tokens_in_blocks as
select token_id // 120 as block, bit_or(1::hugeint << (token_id % 120)::int) as tokens
from stg_tokens_encoded
group by block;
