-- How much the firing of a feature tells about whether a token was chosen, as far as that is sure.
--
-- Grain:   scalar.
-- Reads:   share_low, share_high
-- Units:   bits per chosen token: low * log2(low / high). low is the lower end of the 95% interval of the share
--          n_tokens of n_mine chosen tokens, high the upper end of that of n_rest of n_others (Wilson 1927).
-- Ask it:  select telling_bits(5, 5, 0, 1000)  -- 4.075749435900998
create or replace macro telling_bits(n_tokens, n_mine, n_rest, n_others) as
share_low(n_tokens, n_mine) * log2(share_low(n_tokens, n_mine) / share_high(n_rest, n_others));
