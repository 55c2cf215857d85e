-- The sum over documents of (hits - share * tokens)^2, put together from sums: documents without hits need no row.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   hit_squares, hits_by_tokens and token_squares are the sums over documents of hits^2, hits * tokens and
--          tokens^2. At least 0; null if the share is.
-- Ask it:  select ratio_squares(0.5, 13, 26, 52)  -- 0.0
create or replace macro ratio_squares(share, hit_squares, hits_by_tokens, token_squares) as
case
    when (share) is not null
        then greatest(
            (hit_squares) - 2 * (share) * (hits_by_tokens) + pow((share)::double, 2) * (token_squares), 0
        )::double
end;
