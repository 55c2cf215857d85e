-- How far apart two shares are, as Cohen's h: the same step counts for more near 0 and 1 than in the middle.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   2 asin(sqrt(rate_a)) - 2 asin(sqrt(rate_b)), from -pi to pi; rates are shares from 0 to 1. Null if one is
--          null. Cohen 1988: 0.2 is small, 0.5 medium, 0.8 large.
-- Ask it:  select cohens_h(1.0, 0.0)  -- 3.141592653589793
create or replace macro cohens_h(rate_a, rate_b) as
2 * asin(sqrt(rate_a)) - 2 * asin(sqrt(rate_b));
