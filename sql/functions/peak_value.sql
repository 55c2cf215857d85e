-- The strongest of several values, with its sign; of two magnitudes that are equal the positive one.
--
-- Grain:   aggregate.
-- Reads:   nothing
-- Units:   those of the values.
-- Ask it:  select peak_value(x) from (values (1.0), (-3.0)) as t(x)  -- -3
create or replace macro peak_value(x) as
(case when max(x) >= -min(x) then max(x) else min(x) end);
