-- How many times as often something happens in one group of tokens as in another, as a power of two.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   n_a of tokens_a against n_b of tokens_b, with half a token added to each count, so that the result is always
--          finite; null if it happens in neither, or if a group has no tokens.
-- Ask it:  select log2_rate_ratio(3, 6, 0, 6)  -- 2.807354922057604
create or replace macro log2_rate_ratio(n_a, tokens_a, n_b, tokens_b) as
case
    when (n_a) + (n_b) > 0 and (tokens_a) > 0 and (tokens_b) > 0
        then log2(((n_a) + 0.5) / ((tokens_a) + 1)) - log2(((n_b) + 0.5) / ((tokens_b) + 1))
end;
