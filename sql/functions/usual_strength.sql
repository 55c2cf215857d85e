-- A feature's usual strength when it fires: its mean value or, in a signed run, its root mean square.
--
-- Grain:   scalar.
-- Reads:   src_is_signed
-- Units:   those of the values. The mean of values of both signs may be near zero however strong they are.
-- Ask it:  select usual_strength(4, 6.0, 10.0)  -- 1.5
create or replace macro usual_strength(n, total, total_squares) as
(case when src_is_signed() then sqrt(total_squares / n) else total / n end);
